"""The revisioned store: in memory and on SQLite, one contract (`model.ports.store`); `cache` keeps typed records current."""
