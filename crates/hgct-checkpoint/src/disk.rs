//! The few file-system calls that [`crate::LocalStore`] is made of.
//!
//! They stand behind a trait because what matters happens between them: tests put a disk in their
//! place that is full, writes short, or loses what was not synced.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// One name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// File name.
    pub name: String,
    /// Whether it is a folder; otherwise it is a regular file.
    pub is_dir: bool,
    /// Its length.
    pub size_bytes: u64,
}

/// A file being written.
pub trait WriteFile: Send {
    /// Appends a beginning of `bytes`; how much of it, is returned.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Returns when what was written would outlive a loss of power.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file being read.
pub trait ReadFile: Send {
    /// Its length.
    fn size_bytes(&self) -> u64;
    /// Reads at `offset` into a beginning of `buffer`; 0 at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
}

/// A file system.
pub trait Disk: Send + Sync {
    /// Makes a folder; `AlreadyExists` where there is one, `NotFound` without a parent.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes a new file; `AlreadyExists` where there is one.
    fn create(&self, path: &Path) -> io::Result<Box<dyn WriteFile>>;
    /// Opens a regular file.
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadFile>>;
    /// Renames, and never replaces: `AlreadyExists` where the new name is taken.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Returns when the names in a folder would outlive a loss of power.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty folder.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Regular files and folders in a folder, by name.
    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>>;
}

/// The operating system's.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsDisk;

impl Disk for OsDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn WriteFile>> {
        Ok(Box::new(OsFile { size_bytes: 0, file: File::create_new(path)? }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadFile>> {
        // Looked at before it is opened: opening a named pipe would wait for its other end.
        let metadata = fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Box::new(OsFile { size_bytes: metadata.len(), file: File::open(path)? }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // Some network file systems do not know the flag. A hard link never replaces either.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                if fs::symlink_metadata(from)?.is_dir() {
                    return fs::rename(from, to);
                }
                fs::hard_link(from, to)?;
                fs::remove_file(from)
            }
            done => Ok(done?),
        }
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            // A file may go while the folder is read.
            let Ok(metadata) = fs::metadata(entry.path()) else { continue };
            if metadata.is_dir() || metadata.is_file() {
                entries.push(DirEntry { name, is_dir: metadata.is_dir(), size_bytes: metadata.len() });
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }
}

struct OsFile {
    file: File,
    size_bytes: u64,
}

impl WriteFile for OsFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl ReadFile for OsFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }
}
