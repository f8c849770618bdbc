"""One tuning run: propose, guard, start the engine, send the load, judge, record."""
