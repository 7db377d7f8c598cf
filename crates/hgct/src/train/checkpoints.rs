//! Checkpoint shards that arrive in pieces, written by a thread of its own: the driver must hear
//! the workers while a disk is slow.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
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
        let mut under_way =
            UnderWay { checkpoints: Checkpoints::open(folder), head, writers: BTreeMap::new() };
        let (pieces, inbox) = sync_channel::<Piece>(QUEUE);
        let (answers, done) = sync_channel(64);
        let write = move || {
            if let Err(error) = under_way.checkpoints.clean() {
                let error = anyhow!(error).context("what an interrupted checkpoint left cannot be removed");
                drop(answers.send(Err(error)));
                return;
            }
            for piece in inbox {
                match under_way.take(&piece) {
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

/// The checkpoints under way, by step. No rank waits for the others before it sends its next shard,
/// so there may be several; each rank sends its own in order, so the oldest is complete first.
struct UnderWay {
    checkpoints: Checkpoints,
    head: Head,
    writers: BTreeMap<u64, (CheckpointWriter, Instant)>,
}

impl UnderWay {
    /// Writes a piece, and commits the checkpoint that it completes.
    fn take(&mut self, piece: &Piece) -> Result<Option<Done>> {
        let step = piece.step;
        let (writer, begun) = match self.writers.entry(step) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let writer = begin(&self.checkpoints, &self.head, piece)
                    .with_context(|| format!("the checkpoint of step {step} cannot be begun"))?;
                entry.insert((writer, Instant::now()))
            }
        };
        writer
            .piece(piece.rank, piece.offset, &piece.bytes, piece.end.clone())
            .with_context(|| format!("the checkpoint of step {step} cannot be written"))?;
        if !writer.missing().is_empty() {
            return Ok(None);
        }
        let begun = *begun;
        let Some((writer, _)) = self.writers.remove(&step) else { return Ok(None) };
        let committed =
            writer.commit().with_context(|| format!("the checkpoint of step {step} cannot be committed"))?;
        let size_bytes = committed.manifest.shards.iter().map(|shard| shard.size_bytes).sum();
        Ok(Some(Done { step, size_bytes, seconds: begun.elapsed().as_secs_f64() }))
    }
}

fn begin(checkpoints: &Checkpoints, head: &Head, first: &Piece) -> hgct_checkpoint::Result<CheckpointWriter> {
    let manifest = Manifest {
        format: Manifest::FORMAT,
        run: head.run.clone(),
        generation: head.generation,
        step: first.step,
        num_updates: first.num_updates,
        job: head.plan.job.clone(),
        plan: head.plan.hash(),
        model: head.plan.model.clone(),
        tokenizer: head.tokenizer.clone(),
        shards: Vec::new(),
    };
    let ranks: BTreeSet<Rank> = head.plan.owners.iter().map(|group| group.owner).collect();
    checkpoints.begin(manifest, ranks, head.keep as usize)
}

#[cfg(test)]
mod tests {
    use hgct_checkpoint::ShardWriter;
    use hgct_core::cluster::Grant;
    use hgct_core::ids::{DeviceId, Kind, NodeId};
    use hgct_core::model::ModelSpec;
    use hgct_core::plan::{PlanBuilder, PlanRank};
    use hgct_core::slice::{Role, Slice};

    use super::*;

    fn plan() -> Plan {
        let model = r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2}"#;
        let rank = |index: u32| PlanRank {
            device: DeviceId::new(format!("n/torch:{index}")).unwrap(),
            kind: Kind::new("cpu/torch").unwrap(),
            node: NodeId::new("n").unwrap(),
            grant: Grant { cpu_millicores: 500, cores: Vec::new(), threads: 1, memory_bytes: 1 },
        };
        PlanBuilder::new(ModelSpec::from_config_json("c", model).unwrap(), 16, 4)
            .ranks([rank(0), rank(1)])
            .pipeline(1, 4, &[(Rank(0), 2), (Rank(1), 2)])
            .build()
            .unwrap()
    }

    /// Two pieces of a rank's shard of a step: every other tensor, in all roles.
    fn shard(plan: &Plan, rank: u32, step: u64) -> [Piece; 2] {
        let tensors = plan.model.tensors().into_iter().skip(rank as usize).step_by(2);
        let owned = tensors.flat_map(|tensor| {
            [Role::Parameter, Role::M, Role::V].map(|role| {
                let slice = Slice::rows_of(&tensor, 0..tensor.rows());
                (slice, role, vec![step as f32; (tensor.rows() * tensor.row_elements()) as usize])
            })
        });
        let mut writer = ShardWriter::new(owned.collect()).unwrap();
        let mut bytes = Vec::new();
        assert!(writer.next_chunk(&mut bytes).unwrap().last);
        let rest = bytes.split_off(bytes.len() / 2);
        let piece =
            |offset, bytes, end| Piece { rank: Rank(rank), step, num_updates: step, offset, end, bytes };
        let offset = bytes.len() as u64;
        [piece(0, bytes, None), piece(offset, rest, Some(writer.end()))]
    }

    #[test]
    fn ranks_may_be_at_different_checkpoints() {
        let folder = tempfile::tempdir().unwrap();
        let left = folder.path().join("step-00000001");
        std::fs::create_dir(&left).unwrap();
        std::fs::write(left.join(".tmp-shard-r0.safetensors"), "of an interrupted run").unwrap();
        let plan = Arc::new(plan());
        let head = Head {
            run: RunId::new("run").unwrap(),
            generation: Generation::default(),
            plan: Arc::clone(&plan),
            tokenizer: None,
            keep: 2,
        };
        let writer = Writer::start(folder.path(), head).unwrap();
        let [[a, b], [c, d]] = [shard(&plan, 0, 1), shard(&plan, 1, 1)];
        let [[e, f], [g, h]] = [shard(&plan, 0, 2), shard(&plan, 1, 2)];
        // Rank 0 sends its shard of step 2 while rank 1 is at that of step 1.
        for piece in [a, b, c, e, d, g, f, h] {
            writer.piece(piece).unwrap();
        }
        let steps: Vec<u64> = writer.finish().unwrap().iter().map(|done| done.step).collect();
        assert_eq!(steps, [1, 2]);
        let checkpoints = Checkpoints::open(folder.path());
        assert_eq!(checkpoints.steps().unwrap(), [1, 2]);
        for step in [1, 2] {
            assert_eq!(checkpoints.verify(step).unwrap().manifest().num_updates, step);
        }
    }
}
