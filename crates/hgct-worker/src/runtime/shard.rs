//! Writing owned state out as a checkpoint shard, piece by piece, off the training path.

use std::sync::Mutex;

use hgct_checkpoint::ShardWriter;
use hgct_control::message::FromWorker;

use super::pipe::{Pipe, locked};
use crate::Result;
use crate::train::Snapshot;

/// Sends a snapshot as pieces of a safetensors file. Each piece takes the pipe for itself alone, so
/// beats and step reports go between.
pub(super) fn write(pipe: &Mutex<Pipe>, snapshot: Snapshot, step: u64, num_updates: u64) -> Result<()> {
    let mut writer = ShardWriter::new(snapshot.entries)?;
    let mut piece = Vec::new();
    while let Some(chunk) = writer.next_chunk(&mut piece) {
        let end = chunk.last.then(|| writer.end());
        locked(pipe).send(FromWorker::ShardChunk { step, num_updates, offset: chunk.offset, end }, &piece)?;
    }
    Ok(())
}
