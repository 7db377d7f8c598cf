"""hgct: one training job on devices of several vendors and frameworks."""
