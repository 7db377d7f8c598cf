//! Sharded checkpoints, the manifest, resharding by slices
