//! A disk in memory that fails on purpose: for tests of this crate and of those who write
//! checkpoints.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{DirEntry, Disk, ReadFile, WriteFile};

/// What goes wrong. Changes of the disk (folders, files, writes, syncs, renames, removals) are
/// counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// From this change on, whatever needs space finds none.
    pub no_space_from: Option<u64>,
    /// Power is lost in the middle of this change; all later calls fail until
    /// [`MemoryDisk::restart`].
    pub power_loss_at: Option<u64>,
    /// Most bytes that one write takes.
    pub short_writes: Option<usize>,
}

/// A disk whose files live in memory, with a durable and a volatile side. Clones share it.
#[derive(Clone, Default)]
pub struct MemoryDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    faults: Faults,
    changes: u64,
    off: bool,
    files: Vec<Content>,
    /// What processes see.
    seen: BTreeMap<PathBuf, Node>,
    /// What was synced.
    durable: BTreeMap<PathBuf, Node>,
}

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    /// How many of them were synced.
    synced: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Folder,
    File(usize),
}

impl MemoryDisk {
    /// An empty disk with a root folder.
    pub fn new() -> Self {
        let disk = Self::default();
        disk.state().seen.insert("/".into(), Node::Folder);
        disk.state().durable.insert("/".into(), Node::Folder);
        disk
    }

    /// Sets what goes wrong from now on and counts changes from 1 again.
    pub fn set_faults(&self, faults: Faults) {
        let mut state = self.state();
        state.faults = faults;
        state.changes = 0;
    }

    /// Changes since [`MemoryDisk::set_faults`].
    pub fn changes(&self) -> u64 {
        self.state().changes
    }

    /// Power is lost and comes back. Of every name and every byte that was not synced, `seed`
    /// decides whether it is there; faults are over.
    pub fn restart(&self, seed: u64) {
        let mut random = Random(seed);
        let state = &mut *self.state();
        let mut names: Vec<PathBuf> = state.seen.keys().chain(state.durable.keys()).cloned().collect();
        names.sort();
        names.dedup();
        let mut kept: BTreeMap<PathBuf, Node> = BTreeMap::new();
        for name in names {
            let (seen, durable) = (state.seen.get(&name), state.durable.get(&name));
            let node = if seen == durable || random.next().is_multiple_of(2) { seen } else { durable };
            let parent_there = name.parent().is_none_or(|parent| kept.contains_key(parent));
            if let Some(node) = node.filter(|_| parent_there) {
                kept.insert(name, *node);
            }
        }
        for file in &mut state.files {
            let unsynced = (file.bytes.len() - file.synced) as u64;
            file.bytes.truncate(file.synced + (random.next() % (unsynced + 1)) as usize);
            file.synced = file.bytes.len();
        }
        state.seen.clone_from(&kept);
        state.durable = kept;
        state.off = false;
        state.faults = Faults::default();
    }

    /// All files and their lengths.
    pub fn files(&self) -> Vec<(PathBuf, u64)> {
        let state = self.state();
        let file = |(path, node): (&PathBuf, &Node)| match node {
            Node::File(file) => Some((path.clone(), state.files[*file].bytes.len() as u64)),
            Node::Folder => None,
        };
        state.seen.iter().filter_map(file).collect()
    }

    /// Changes a file's bytes behind everybody's back.
    pub fn tamper(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        if let Some(Node::File(file)) = state.seen.get(path).copied() {
            let content = &mut state.files[file];
            change(&mut content.bytes);
            content.synced = content.bytes.len();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn live(&self) -> io::Result<()> {
        if self.off { Err(io::Error::other("power is off")) } else { Ok(()) }
    }

    /// Counts a change and says whether power is lost in it.
    fn change(&mut self, needs_space: bool) -> io::Result<bool> {
        self.live()?;
        self.changes += 1;
        if needs_space && self.faults.no_space_from.is_some_and(|from| self.changes >= from) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.off = self.faults.power_loss_at == Some(self.changes);
        Ok(self.off)
    }

    /// A change that happens whole; where power is lost in it, it happened, unsynced.
    fn done(&self) -> io::Result<()> {
        self.live()
    }

    fn insert_new(&mut self, path: &Path, node: Node) -> io::Result<()> {
        if self.seen.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        match path.parent().map(|parent| self.seen.get(parent)) {
            Some(Some(Node::Folder)) => {}
            Some(Some(Node::File(_))) => return Err(io::ErrorKind::NotADirectory.into()),
            _ => return Err(io::ErrorKind::NotFound.into()),
        }
        self.seen.insert(path.into(), node);
        Ok(())
    }

    fn children(&self, path: &Path) -> Vec<(PathBuf, Node)> {
        let children = self.seen.iter().filter(|(child, _)| child.parent() == Some(path));
        children.map(|(child, node)| (child.clone(), *node)).collect()
    }

    fn take(&mut self, path: &Path, wanted: fn(Node) -> bool) -> io::Result<Node> {
        match self.seen.get(path) {
            Some(node) if wanted(*node) => {}
            _ => return Err(io::ErrorKind::NotFound.into()),
        }
        self.seen.remove(path).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Disk for MemoryDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.change(true)?;
        state.insert_new(path, Node::Folder)?;
        state.done()
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn WriteFile>> {
        let mut state = self.state();
        state.change(true)?;
        let file = state.files.len();
        state.insert_new(path, Node::File(file))?;
        state.files.push(Content::default());
        state.done()?;
        Ok(Box::new(MemoryFile { disk: self.clone(), file, size_bytes: 0 }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadFile>> {
        let state = self.state();
        state.live()?;
        let Some(Node::File(file)) = state.seen.get(path).copied() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let size_bytes = state.files[file].bytes.len() as u64;
        Ok(Box::new(MemoryFile { disk: self.clone(), file, size_bytes }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.change(true)?;
        let Some(node) = state.seen.get(from).copied() else { return Err(io::ErrorKind::NotFound.into()) };
        state.insert_new(to, node)?;
        state.seen.remove(from);
        let inside: Vec<PathBuf> = state.seen.keys().filter(|p| p.starts_with(from)).cloned().collect();
        for path in inside {
            if let (Ok(rest), Some(node)) = (path.strip_prefix(from), state.seen.get(&path).copied()) {
                state.seen.insert(to.join(rest), node);
                // What was synced inside of a folder moves with it.
                if state.durable.remove(&path).is_some() {
                    state.durable.insert(to.join(rest), node);
                }
            }
            state.seen.remove(&path);
        }
        state.done()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.change(false)? {
            return Err(io::Error::other("power is off"));
        }
        if state.seen.get(path) != Some(&Node::Folder) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.durable.retain(|child, _| child.parent() != Some(path));
        let children = state.children(path);
        state.durable.extend(children);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.change(false)?;
        state.take(path, |node| matches!(node, Node::File(_)))?;
        state.done()
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.change(false)?;
        if !state.children(path).is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        state.take(path, |node| node == Node::Folder)?;
        state.done()
    }

    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let state = self.state();
        state.live()?;
        match state.seen.get(path) {
            Some(Node::Folder) => {}
            Some(Node::File(_)) => return Err(io::ErrorKind::NotADirectory.into()),
            None => return Err(io::ErrorKind::NotFound.into()),
        }
        let entry = |(child, node): (PathBuf, Node)| DirEntry {
            name: child.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            is_dir: node == Node::Folder,
            size_bytes: if let Node::File(file) = node { state.files[file].bytes.len() as u64 } else { 0 },
        };
        Ok(state.children(path).into_iter().map(entry).collect())
    }
}

struct MemoryFile {
    disk: MemoryDisk,
    file: usize,
    size_bytes: u64,
}

impl WriteFile for MemoryFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.disk.state();
        let lost = state.change(true)?;
        let most = state.faults.short_writes.unwrap_or(usize::MAX);
        let taken = bytes.len().min(most) / if lost { 2 } else { 1 };
        state.files[self.file].bytes.extend_from_slice(&bytes[..taken]);
        state.done()?;
        Ok(taken)
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.disk.state();
        if state.change(true)? {
            return Err(io::Error::other("power is off"));
        }
        let content = &mut state.files[self.file];
        content.synced = content.bytes.len();
        Ok(())
    }
}

impl ReadFile for MemoryFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.disk.state();
        state.live()?;
        let bytes = &state.files[self.file].bytes;
        let rest = &bytes[bytes.len().min(offset as usize)..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
