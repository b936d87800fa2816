"""What draws and what judges: networks with their shipped weights, captions, CLIP, rewards, pipelines, chains."""
