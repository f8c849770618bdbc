"""The journal (SQLite): trials, runs, events, and everything derived from them."""
