//! A folder that appears whole or not at all.

use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// Prefix of folders that are still being filled.
const STAGING: &str = ".staging-";

/// Opens the files of a staging folder; tests put one here that fails.
pub(crate) type Create<'a> = &'a dyn Fn(&Path) -> io::Result<Box<dyn Sink>>;

/// A file that is being written.
pub(crate) trait Sink: Write {
    /// Makes what was written durable.
    fn sync(&mut self) -> io::Result<()>;
}

impl Sink for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// The real way to open a file.
pub(crate) fn create_file(path: &Path) -> io::Result<Box<dyn Sink>> {
    Ok(Box::new(File::create_new(path)?))
}

/// A folder under a temporary name, removed again unless committed. The lock beside it tells a
/// living writer from one that was killed.
pub(crate) struct Staging<'a> {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
    create: Create<'a>,
}

impl<'a> Staging<'a> {
    /// Makes the folder below `parent`, and clears away what killed writers left there.
    pub(crate) fn begin(parent: &Path, create: Create<'a>) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        remove_abandoned(parent)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("{STAGING}{}-{number}", std::process::id()));
        let lock_path = path.with_added_extension("lock");
        // The lock first: a folder without a held lock counts as abandoned.
        let lock = File::create(&lock_path).map_err(Error::io("create", &lock_path))?;
        lock.try_lock().map_err(io::Error::from).map_err(Error::io("lock", &lock_path))?;
        let staging = Self { path, lock_path, _lock: lock, create };
        fs::create_dir(&staging.path).map_err(Error::io("create", &staging.path))?;
        Ok(staging)
    }

    /// Path of a file in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes one file durably; the content comes from `fill`.
    pub(crate) fn write(&self, name: &str, fill: &mut dyn FnMut(&mut Output) -> Result<()>) -> Result<()> {
        let path = self.path(name);
        let sink = (self.create)(&path).map_err(Error::io("create", &path))?;
        let mut output = Output { sink: BufWriter::with_capacity(1 << 20, sink), path };
        fill(&mut output)?;
        let Output { sink, path } = output;
        let sink = sink.into_inner().map_err(io::IntoInnerError::into_error);
        sink.and_then(|mut sink| sink.sync()).map_err(Error::io("write", &path))
    }

    /// Removes a file that was only needed on the way.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        fs::remove_file(&path).map_err(Error::io("remove", &path))
    }

    /// Gives the folder its name. Where another writer was faster, theirs stays.
    pub(crate) fn commit(self, target: &Path) -> Result<()> {
        sync_folder(&self.path)?;
        match fs::rename(&self.path, target) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            Err(error) => return Err(Error::io("rename to", target)(error)),
        }
        target.parent().map_or(Ok(()), sync_folder)
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        // After a commit there is nothing under the old name.
        let _ = fs::remove_dir_all(&self.path);
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// A file of a staging folder that is being filled.
pub(crate) struct Output {
    sink: BufWriter<Box<dyn Sink>>,
    path: PathBuf,
}

impl Output {
    /// Appends bytes.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.sink.write_all(bytes).map_err(Error::io("write", &self.path))
    }
}

/// Makes renames in `folder` durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io("write", folder))
}

fn remove_abandoned(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent).map_err(Error::io("list", parent))? {
        let path = entry.map_err(Error::io("list", parent))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
        let Some(folder) = name.strip_suffix(".lock").filter(|name| name.starts_with(STAGING)) else {
            continue;
        };
        let Ok(lock) = File::open(&path) else { continue };
        match lock.try_lock() {
            Ok(()) => {
                let folder = parent.join(folder);
                if folder.is_dir() {
                    fs::remove_dir_all(&folder).map_err(Error::io("remove", &folder))?;
                }
                let _ = fs::remove_file(&path);
            }
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("target");
        let staging = Staging::begin(parent.path(), &create_file).unwrap();
        staging.write("a", &mut |out| out.put(b"x")).unwrap();
        drop(staging);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
        let staging = Staging::begin(parent.path(), &create_file).unwrap();
        staging.write("a", &mut |out| out.put(b"x")).unwrap();
        staging.commit(&target).unwrap();
        assert_eq!(fs::read(target.join("a")).unwrap(), b"x");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_first_writer_wins() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("target");
        for content in [b"1", b"2"] {
            let staging = Staging::begin(parent.path(), &create_file).unwrap();
            staging.write("a", &mut |out| out.put(content)).unwrap();
            staging.commit(&target).unwrap();
        }
        assert_eq!(fs::read(target.join("a")).unwrap(), b"1");
    }

    #[test]
    fn what_a_killed_writer_left_is_cleared_and_a_living_one_kept() {
        let parent = tempfile::tempdir().unwrap();
        let living = Staging::begin(parent.path(), &create_file).unwrap();
        fs::create_dir(parent.path().join(".staging-1-0")).unwrap();
        fs::write(parent.path().join(".staging-1-0.lock"), b"").unwrap();
        drop(Staging::begin(parent.path(), &create_file).unwrap());
        assert!(living.path.is_dir());
        assert!(!parent.path().join(".staging-1-0").exists());
        assert!(!parent.path().join(".staging-1-0.lock").exists());
    }
}
