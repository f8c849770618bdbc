"""The journal's schema migrations."""

# Each script migrates the file by one version; a new file goes through all of them.
_FIRST = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL,           -- of the configuration; see sidecar.config.schema.Config.digest
    config TEXT NOT NULL,           -- JSON
    incumbent TEXT NOT NULL,        -- JSON, engine arguments
    started_at REAL NOT NULL,
    ended_at REAL,
    decision TEXT                   -- JSON
);
CREATE TABLE trials (
    run INTEGER NOT NULL REFERENCES runs (id),
    number INTEGER NOT NULL,
    plan TEXT NOT NULL,             -- JSON, sidecar.record.trial.Plan
    started_at REAL NOT NULL,
    ended_at REAL,
    result TEXT,                    -- JSON, sidecar.record.trial.Result; NULL with an ended_at: aborted
    PRIMARY KEY (run, number)
);
CREATE TABLE engines (              -- started, and not known to be gone
    engine_id TEXT PRIMARY KEY,
    role TEXT NOT NULL,             -- 'trial' or 'serving'
    pid INTEGER NOT NULL,           -- 0: about to be started
    started_at REAL NOT NULL,
    launch TEXT NOT NULL            -- JSON
);
CREATE TABLE promotions (
    id INTEGER PRIMARY KEY,
    run INTEGER REFERENCES runs (id),
    base_digest TEXT NOT NULL,
    args TEXT NOT NULL,             -- JSON
    at REAL NOT NULL
);
CREATE TABLE states (               -- every state entered by the sidecar; the last is the present one
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    until REAL                      -- the window's end
);
"""
_LEARNED = """
CREATE TABLE starts (               -- memory reported by vLLM
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    host TEXT NOT NULL,
    model TEXT NOT NULL,
    start TEXT NOT NULL             -- JSON, vllm_sloguard.guard.start_history.Start
);
CREATE TABLE rules (                -- limits learned from crashes
    id INTEGER PRIMARY KEY,
    host TEXT NOT NULL,
    model TEXT NOT NULL,
    expires_at REAL NOT NULL,
    rule TEXT NOT NULL              -- JSON, vllm_sloguard.guard.start_history.Rule
);
"""
_EVIDENCE = """
ALTER TABLE promotions ADD COLUMN evidence TEXT; -- JSON: what the decision rests on, and where it was measured
"""
_OPERATIONS = """
CREATE TABLE epochs (               -- each sidecar that took over the folder; the last is in charge
    epoch INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    pid INTEGER NOT NULL
);
CREATE TABLE rollbacks (            -- promotions rolled back; their arguments are not promoted again
    promotion INTEGER PRIMARY KEY REFERENCES promotions (id),
    at REAL NOT NULL,
    reason TEXT NOT NULL
);
CREATE TABLE events (               -- see sidecar.record.events
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    content TEXT NOT NULL           -- JSON
);
CREATE INDEX events_by_kind ON events (kind, id);
"""
_BOOT = """
ALTER TABLE engines ADD COLUMN boot_id TEXT NOT NULL DEFAULT ''; -- of the kernel under which pid and started_at hold
"""
_ACTIONS = """
CREATE TABLE orders (               -- see sidecar.record.action_queue
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    door TEXT NOT NULL,
    content TEXT NOT NULL,          -- JSON
    outcome TEXT NOT NULL,
    result TEXT NOT NULL,
    ended_at REAL
);
CREATE INDEX orders_by_outcome ON orders (outcome, kind, id);
"""
_CAUSES = """
ALTER TABLE states ADD COLUMN cause TEXT NOT NULL DEFAULT ''; -- sidecar.record.states.Cause; empty in older rows
UPDATE states SET cause = 'engine_stopped' WHERE state = 'halted' AND reason = 'stopped, with its engine';
UPDATE states SET cause = 'engine_left' WHERE state = 'halted' AND reason = 'stopped; the engine serves on';
"""
# Journals have been written with each of these: none may change, new ones are appended.
MIGRATIONS = (_FIRST, _LEARNED, _EVIDENCE, _OPERATIONS, _BOOT, _ACTIONS, _CAUSES)
LEARNED, OPERATIONS, ACTIONS, VERSION = 2, 4, 6, len(MIGRATIONS)
