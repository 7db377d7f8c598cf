//! The checkpoints of a run: listing, verifying, the newest good one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hgct_core::canonical::Hash;
use hgct_core::ids::Rank;
use hgct_core::manifest::{Manifest, Shard, ShardEntry};
use sha2::{Digest as _, Sha256};

use crate::store::{Object, Store};
use crate::{CHUNK_BYTES, CheckpointWriter, Error, LocalStore, Result, header};

/// A longer manifest is refused unread. About 24,000 slices fit.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 8 << 20;

/// The checkpoints in one store.
#[derive(Clone)]
pub struct Checkpoints {
    store: Arc<dyn Store>,
}

/// A committed checkpoint whose every byte was verified when it was opened.
#[derive(Clone)]
pub struct Checkpoint {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) manifest: Manifest,
    /// First byte of each entry of each shard.
    pub(crate) places: Vec<Vec<u64>>,
}

/// A checkpoint that was passed over.
#[derive(Debug)]
pub struct Bad {
    /// Its step.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
    /// Why it cannot be used.
    pub reason: Error,
}

/// What [`Checkpoints::newest_verified`] found.
#[derive(Debug)]
pub struct Newest {
    /// The newest that verifies, if any does.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that do not, the newest first.
    pub bad: Vec<Bad>,
}

impl Checkpoints {
    /// The checkpoints in a folder; without a folder there are none.
    pub fn open(folder: impl Into<PathBuf>) -> Self {
        Self::on(Arc::new(LocalStore::new(folder)))
    }

    /// The checkpoints in a store.
    pub fn on(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// What a person means by `path`: the folder of a run, of its checkpoints, or of one of them,
    /// whose step is then returned.
    pub fn find(path: &Path) -> Result<(Self, Option<u64>)> {
        let step = path.file_name().and_then(|name| step_of(&name.to_string_lossy()));
        if let (Some(step), Some(folder)) = (step, path.parent()) {
            let here = folder.as_os_str().is_empty();
            return Ok((Self::open(if here { Path::new(".") } else { folder }), Some(step)));
        }
        let inside = path.join("checkpoints");
        let checkpoints = Self::open(if inside.is_dir() { inside } else { path.into() });
        if checkpoints.steps()?.is_empty() {
            return Err(Error::NotFound { path: path.into(), step: None });
        }
        Ok((checkpoints, None))
    }

    /// Steps of the committed checkpoints, in order; not verified.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let objects = self.store.list()?;
        let folders = objects.iter().filter_map(|object| object.name.strip_suffix("/manifest.json"));
        let mut steps: Vec<u64> = folders.filter_map(step_of).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Opens one checkpoint and verifies all of it: manifest, lengths, hashes, headers.
    pub fn verify(&self, step: u64) -> Result<Checkpoint> {
        let name = format!("{}/{}", folder(step), Manifest::FILE);
        let path = self.store.locate(&name);
        if !self.steps()?.contains(&step) {
            return Err(Error::NotFound { path: self.store.locate(""), step: Some(step) });
        }
        let mut object = self.store.open(&name)?;
        if object.size_bytes() > MAX_MANIFEST_BYTES {
            return Err(Error::damaged(&path, format!("{} bytes are too long", object.size_bytes())));
        }
        let mut text = vec![0; object.size_bytes() as usize];
        object.read_range(0, &mut text)?;
        let text = String::from_utf8(text).map_err(|_| Error::damaged(&path, "it is not UTF-8 text"))?;
        let manifest = Manifest::from_json(&path.display().to_string(), &text)?;
        if manifest.step != step {
            return Err(Error::damaged(&path, format!("it is of step {}", manifest.step)));
        }
        let places = manifest
            .shards
            .iter()
            .map(|shard| verify_shard(self.store.as_ref(), step, shard))
            .collect::<Result<_>>()?;
        Ok(Checkpoint { store: self.store.clone(), manifest, places })
    }

    /// The newest checkpoint that verifies, and which newer ones do not, and why.
    pub fn newest_verified(&self) -> Result<Newest> {
        let mut bad = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            match self.verify(step) {
                Ok(checkpoint) => return Ok(Newest { checkpoint: Some(checkpoint), bad }),
                Err(reason) => bad.push(Bad { step, path: self.store.locate(&folder(step)), reason }),
            }
        }
        Ok(Newest { checkpoint: None, bad })
    }

    /// Begins the checkpoint of `head` (a manifest without shards yet) that `ranks` will fill.
    /// After its commit the newest `keep` stay, at least one.
    ///
    /// Those of other steps may be under way. What an interrupted one left must be gone, see
    /// [`Self::clean`]; a committed one of this step makes place only if it is damaged.
    pub fn begin(
        &self,
        head: Manifest,
        ranks: impl IntoIterator<Item = Rank>,
        keep: usize,
    ) -> Result<CheckpointWriter> {
        let step = head.step;
        if self.steps()?.contains(&step) {
            match self.verify(step) {
                Ok(_) => {
                    let path = self.store.locate(&folder(step));
                    return Err(Error::AlreadyCommitted { step, path });
                }
                Err(error) if error.is_damage() => self.discard(step)?,
                Err(error) => return Err(error),
            }
        }
        Ok(CheckpointWriter::new(self.clone(), head, ranks, keep))
    }

    /// Removes what interrupted checkpoints left: unfinished files, and shards without a manifest.
    /// One under way looks the same, so clean before the first begins.
    pub fn clean(&self) -> Result<()> {
        self.store.remove_unfinished()?;
        let committed = self.steps()?;
        let objects = self.store.list()?;
        let folders = objects.iter().filter_map(|object| step_of(object.name.split_once('/')?.0));
        let mut left: Vec<u64> = folders.filter(|step| !committed.contains(step)).collect();
        left.dedup();
        left.into_iter().try_for_each(|step| self.discard(step))
    }

    /// Removes one checkpoint, the manifest first so that it never is a commit without shards.
    pub fn discard(&self, step: u64) -> Result<()> {
        self.store.remove(&format!("{}/{}", folder(step), Manifest::FILE))?;
        let prefix = format!("{}/", folder(step));
        for object in self.store.list()?.iter().filter(|object| object.name.starts_with(&prefix)) {
            self.store.remove(&object.name)?;
        }
        Ok(())
    }

    /// Removes what was written of a checkpoint, unless it has a manifest: whoever wrote that, it
    /// counts.
    pub(crate) fn discard_uncommitted(&self, step: u64) -> Result<()> {
        if self.steps()?.contains(&step) { Ok(()) } else { self.discard(step) }
    }

    pub(crate) fn store(&self) -> &dyn Store {
        self.store.as_ref()
    }
}

impl Checkpoint {
    /// Its table of contents.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its folder.
    pub fn path(&self) -> PathBuf {
        self.store.locate(&folder(self.manifest.step))
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("path", &self.path()).finish_non_exhaustive()
    }
}

/// Folder of a step's checkpoint.
pub(crate) fn folder(step: u64) -> String {
    format!("step-{step:08}")
}

fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (folder(step) == name).then_some(step)
}

/// Checks length, hash and header of a shard; returns where its entries begin.
fn verify_shard(store: &dyn Store, step: u64, shard: &Shard) -> Result<Vec<u64>> {
    let name = format!("{}/{}", folder(step), shard.file);
    let path = store.locate(&name);
    let mut object = match store.open(&name) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::damaged(&path, "it is not there"));
        }
        opened => opened?,
    };
    if object.size_bytes() != shard.size_bytes {
        let (found, expected) = (object.size_bytes(), shard.size_bytes);
        return Err(Error::damaged(&path, format!("{found} bytes, written were {expected}")));
    }
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES.min(shard.size_bytes as usize)];
    let mut offset = 0;
    while offset < shard.size_bytes {
        let length = buffer.len().min((shard.size_bytes - offset) as usize);
        object.read_range(offset, &mut buffer[..length])?;
        hasher.update(&buffer[..length]);
        offset += length as u64;
    }
    let found = Hash::from_digest(&hasher.finalize());
    if found != shard.sha256 {
        let reason = format!("its SHA-256 is {}, written was {}", found.short(), shard.sha256.short());
        return Err(Error::damaged(&path, reason));
    }
    check_header(object.as_mut(), &path, &shard.entries)
}

/// Checks that a shard's header lists exactly `entries`; returns where each begins.
pub(crate) fn check_header(object: &mut dyn Object, path: &Path, entries: &[ShardEntry]) -> Result<Vec<u64>> {
    let found: BTreeMap<_, _> = header::read(object, path)?;
    if found.len() != entries.len() {
        let reason = format!("it has {} tensors, the manifest {}", found.len(), entries.len());
        return Err(Error::damaged(path, reason));
    }
    let place = |entry: &ShardEntry| match found.get(&entry.key) {
        Some(tensor) if tensor.dtype == entry.dtype && tensor.shape == entry.slice.shape() => {
            Ok(tensor.begin)
        }
        Some(tensor) => {
            let (dtype, shape) = (tensor.dtype, &tensor.shape);
            let reason = format!(
                "{:?} is {dtype} {shape:?}, the manifest has {} {}",
                entry.key, entry.dtype, entry.slice
            );
            Err(Error::damaged(path, reason))
        }
        None => Err(Error::damaged(path, format!("it has no {:?}", entry.key))),
    };
    entries.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_name_steps_and_nothing_else() {
        assert_eq!(folder(20), "step-00000020");
        assert_eq!(step_of("step-00000020"), Some(20));
        assert_eq!(step_of("step-123456789"), Some(123_456_789));
        for other in ["step-20", "step-+0000020", "step-0000000x", "Step-00000020", "step-000000020"] {
            assert_eq!(step_of(other), None, "{other}");
        }
    }
}
