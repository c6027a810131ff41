"""The run: engine, loop and artefacts; may import model and data."""
