"""What is somebody's own file of tests is run in a session of its own: see test_examples.py."""

collect_ignore = ["test_pipeline.py"]
