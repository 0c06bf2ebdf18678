"""The processes: launcher and keeper, their start, reload and checks."""
