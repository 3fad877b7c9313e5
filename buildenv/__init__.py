"""The build environment: buildspec language, images, engine, phases, source and artifacts. Knows no queue and no database."""
