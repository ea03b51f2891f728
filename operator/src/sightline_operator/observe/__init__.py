"""What is: the live objects that concern one VisionPipeline or VisionBatch."""
