//! The coordinator's side: pieces of several shards in, a committed checkpoint out.

use std::collections::BTreeMap;

use hgct_core::canonical::{self, Hash};
use hgct_core::ids::Rank;
use hgct_core::manifest::{Manifest, Shard, ShardEnd};
use sha2::{Digest as _, Sha256};

use crate::checkpoints::{Checkpoints, MAX_MANIFEST_BYTES, check_header, folder};
use crate::header::MAX_HEADER_BYTES;
use crate::store::Upload;
use crate::{CHUNK_BYTES, Error, Result, shard_file};

/// Roles that a checkpoint can hold of one element: parameter, master, m, v.
const MOST_ROLES: u64 = 4;

/// One checkpoint being written. Nothing of it counts before [`CheckpointWriter::commit`]; dropped
/// before, it is removed. It holds no piece longer than the call that brings it.
pub struct CheckpointWriter {
    checkpoints: Checkpoints,
    head: Manifest,
    keep: usize,
    shards: BTreeMap<Rank, State>,
    /// A shard longer than the whole model is an error of its sender, not a reason to fill the disk.
    most_bytes: u64,
    committed: bool,
}

enum State {
    Waiting,
    Open { upload: Box<dyn Upload>, hasher: Sha256, size_bytes: u64 },
    Done(Shard),
}

/// A checkpoint that was just committed.
#[derive(Debug)]
pub struct Committed {
    /// Its table of contents.
    pub manifest: Manifest,
    /// Older steps that were removed.
    pub removed: Vec<u64>,
    /// An older step that should have been removed, and why it is still there.
    pub not_removed: Option<(u64, Error)>,
}

impl CheckpointWriter {
    pub(crate) fn new(
        checkpoints: Checkpoints,
        head: Manifest,
        ranks: impl IntoIterator<Item = Rank>,
        keep: usize,
    ) -> Self {
        let most_bytes = head.model.num_parameters() * 4 * MOST_ROLES + MAX_HEADER_BYTES;
        Self {
            checkpoints,
            head,
            keep: keep.max(1),
            shards: ranks.into_iter().map(|rank| (rank, State::Waiting)).collect(),
            most_bytes,
            committed: false,
        }
    }

    /// The step that it is of.
    pub fn step(&self) -> u64 {
        self.head.step
    }

    /// Ranks whose shard is not complete.
    pub fn missing(&self) -> Vec<Rank> {
        let open = self.shards.iter().filter(|(_, state)| !matches!(state, State::Done(_)));
        open.map(|(rank, _)| *rank).collect()
    }

    /// Takes the next piece of a rank's shard. `end` comes with the last one and says what the shard
    /// holds and its hash; the shard is then checked against it and made durable.
    ///
    /// After an error the checkpoint cannot be completed: drop it.
    pub fn piece(&mut self, rank: Rank, offset: u64, bytes: &[u8], end: Option<ShardEnd>) -> Result<()> {
        let name = format!("{}/{}", folder(self.head.step), shard_file(rank));
        let fail = |expected: String| Err(Error::Piece { rank, offset, bytes: bytes.len() as u64, expected });
        let Some(state) = self.shards.get_mut(&rank) else {
            return fail("none: the rank owns nothing".into());
        };
        if let State::Waiting = state {
            let upload = self.checkpoints.store().create(&name)?;
            *state = State::Open { upload, hasher: Sha256::new(), size_bytes: 0 };
        }
        let State::Open { upload, hasher, size_bytes } = state else {
            return fail("none after the last".into());
        };
        if offset != *size_bytes {
            return fail(format!("byte {size_bytes}"));
        }
        if bytes.len() > CHUNK_BYTES || *size_bytes + bytes.len() as u64 > self.most_bytes {
            return fail(format!("at most {CHUNK_BYTES} at once, {} in all", self.most_bytes));
        }
        upload.write(bytes)?;
        hasher.update(bytes);
        *size_bytes += bytes.len() as u64;
        match end {
            Some(end) => self.finish(rank, &name, end),
            None => Ok(()),
        }
    }

    fn finish(&mut self, rank: Rank, name: &str, end: ShardEnd) -> Result<()> {
        let Some(State::Open { upload, hasher, size_bytes }) = self.shards.remove(&rank) else {
            return Ok(());
        };
        // Until it is done the rank counts as missing again.
        self.shards.insert(rank, State::Waiting);
        let ShardEnd { entries, sha256 } = end;
        let store = self.checkpoints.store();
        let found = Hash::from_digest(&hasher.finalize());
        if found != sha256 {
            let reason = format!(
                "the SHA-256 of what came is {}, its owner sent {}: it was changed on its way",
                found.short(),
                sha256.short()
            );
            return Err(Error::damaged(&store.locate(name), reason));
        }
        upload.commit()?;
        check_header(store.open(name)?.as_mut(), &store.locate(name), &entries)?;
        self.shards.insert(rank, State::Done(Shard { file: shard_file(rank), sha256, size_bytes, entries }));
        Ok(())
    }

    /// Writes the manifest: from then on the checkpoint counts. Then removes the oldest ones
    /// beyond those to keep, which is not an error of this checkpoint where it fails.
    pub fn commit(mut self) -> Result<Committed> {
        let step = self.head.step;
        let ranks = self.missing();
        if !ranks.is_empty() {
            return Err(Error::Incomplete { step, ranks });
        }
        let mut manifest = self.head.clone();
        let done = self.shards.values().filter_map(|state| match state {
            State::Done(shard) => Some(shard.clone()),
            _ => None,
        });
        manifest.shards = done.collect();
        let name = format!("{}/{}", folder(step), Manifest::FILE);
        let store = self.checkpoints.store();
        let path = store.locate(&name);
        manifest.validate(&path.display().to_string())?;
        let text = canonical::encode(&manifest);
        if text.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(Error::damaged(
                &path,
                format!("{} bytes would be too long to read back", text.len()),
            ));
        }
        let mut upload = store.create(&name)?;
        upload.write(text.as_bytes())?;
        upload.commit()?;
        self.committed = true;
        let (removed, not_removed) = self.remove_old();
        Ok(Committed { manifest, removed, not_removed })
    }

    /// Removes all but the newest `keep` steps up to this one. Newer ones (of a run that went back
    /// behind them) are not this run's to remove.
    fn remove_old(&self) -> (Vec<u64>, Option<(u64, Error)>) {
        let mut removed = Vec::new();
        let steps = match self.checkpoints.steps() {
            Ok(steps) => steps,
            Err(error) => return (removed, Some((self.head.step, error))),
        };
        let upto: Vec<u64> = steps.into_iter().filter(|step| *step <= self.head.step).collect();
        for step in &upto[..upto.len().saturating_sub(self.keep)] {
            match self.checkpoints.discard(*step) {
                Ok(()) => removed.push(*step),
                Err(error) => return (removed, Some((*step, error))),
            }
        }
        (removed, None)
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if !self.committed {
            self.shards.clear();
            // Best effort: the next `clean` removes what stays.
            let _ = self.checkpoints.discard_uncommitted(self.head.step);
        }
    }
}
