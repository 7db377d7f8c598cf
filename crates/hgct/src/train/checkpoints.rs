//! Checkpoint shards that arrive in pieces, written by a thread of its own: the driver must hear
//! the workers while a disk is slow.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};
use hgct_checkpoint::{CheckpointWriter, Checkpoints};
use hgct_core::canonical::Hash;
use hgct_core::ids::{Generation, Rank, RunId};
use hgct_core::manifest::{Manifest, ShardEnd};
use hgct_core::plan::Plan;

/// Pieces (1 MiB at most each) that may wait for the disk.
const QUEUE: usize = 12;

/// What all checkpoints of one generation have in common.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) run: RunId,
    pub(crate) generation: Generation,
    pub(crate) plan: Arc<Plan>,
    pub(crate) tokenizer: Option<Hash>,
    pub(crate) keep: u32,
}

/// A piece of a rank's shard.
pub(crate) struct Piece {
    pub(crate) rank: Rank,
    pub(crate) step: u64,
    pub(crate) num_updates: u64,
    pub(crate) offset: u64,
    pub(crate) end: Option<ShardEnd>,
    pub(crate) bytes: Vec<u8>,
}

/// A checkpoint that counts.
#[derive(Debug, Clone)]
pub(crate) struct Done {
    pub(crate) step: u64,
    pub(crate) size_bytes: u64,
    pub(crate) seconds: f64,
}

/// The writing thread.
pub(crate) struct Writer {
    pieces: SyncSender<Piece>,
    done: Receiver<Result<Done>>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Writes checkpoints under `folder`.
    pub(crate) fn start(folder: &Path, head: Head) -> Result<Self> {
        let checkpoints = Checkpoints::open(folder);
        let (pieces, inbox) = sync_channel::<Piece>(QUEUE);
        let (answers, done) = sync_channel(64);
        let write = move || {
            let mut current: Option<(CheckpointWriter, Instant)> = None;
            for piece in inbox {
                match take(&checkpoints, &head, &mut current, piece) {
                    Ok(None) => {}
                    Ok(Some(finished)) => drop(answers.send(Ok(finished))),
                    Err(error) => {
                        drop(answers.send(Err(error)));
                        return;
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("hgct-checkpoints".into()).spawn(write)?;
        Ok(Self { pieces, done, thread })
    }

    /// Hands a piece over; waits while the disk is behind.
    pub(crate) fn piece(&self, piece: Piece) -> Result<()> {
        if self.pieces.send(piece).is_ok() {
            return Ok(());
        }
        // The thread has ended: its last answer says why.
        Err(self
            .done
            .iter()
            .find_map(Result::err)
            .unwrap_or_else(|| anyhow!("the checkpoint writer has ended")))
    }

    /// Checkpoints that were committed since the last call.
    pub(crate) fn committed(&self) -> Result<Vec<Done>> {
        self.done.try_iter().collect()
    }

    /// Waits until everything handed over is written.
    pub(crate) fn finish(self) -> Result<Vec<Done>> {
        let Self { pieces, done, thread } = self;
        drop(pieces);
        let all = done.iter().collect();
        thread.join().map_err(|_| anyhow!("the checkpoint writer panicked"))?;
        all
    }
}

fn take(
    checkpoints: &Checkpoints,
    head: &Head,
    current: &mut Option<(CheckpointWriter, Instant)>,
    piece: Piece,
) -> Result<Option<Done>> {
    if current.as_ref().is_none_or(|(writer, _)| writer.step() != piece.step) {
        let manifest = Manifest {
            format: Manifest::FORMAT,
            run: head.run.clone(),
            generation: head.generation,
            step: piece.step,
            num_updates: piece.num_updates,
            job: head.plan.job.clone(),
            plan: head.plan.hash(),
            model: head.plan.model.clone(),
            tokenizer: head.tokenizer.clone(),
            shards: Vec::new(),
        };
        let mut ranks: Vec<Rank> = head.plan.owners.iter().map(|group| group.owner).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let writer = checkpoints
            .begin(manifest, ranks, head.keep as usize)
            .with_context(|| format!("the checkpoint of step {} cannot be begun", piece.step))?;
        *current = Some((writer, Instant::now()));
    }
    let Some((writer, begun)) = current else { return Ok(None) };
    writer
        .piece(piece.rank, piece.offset, &piece.bytes, piece.end)
        .with_context(|| format!("the checkpoint of step {} cannot be written", piece.step))?;
    if !writer.missing().is_empty() {
        return Ok(None);
    }
    let begun = *begun;
    let Some((writer, _)) = current.take() else { return Ok(None) };
    let committed = writer
        .commit()
        .with_context(|| format!("the checkpoint of step {} cannot be committed", piece.step))?;
    let size_bytes = committed.manifest.shards.iter().map(|shard| shard.size_bytes).sum();
    Ok(Some(Done { step: piece.step, size_bytes, seconds: begun.elapsed().as_secs_f64() }))
}
