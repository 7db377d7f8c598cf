//! Objects as files of a folder.
//!
//! An object is written to a temporary name, synced, renamed without replacing, and its folder
//! synced: after a crash at any moment it is there whole or not at all.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::{DirEntry, Disk, OsDisk, ReadFile, WriteFile};
use crate::store::{Object, ObjectInfo, Store, Upload, check_name};
use crate::{Error, Result};

/// What the names of unfinished files begin with.
const UNFINISHED: &str = ".tmp-";

/// A folder as a [`Store`]. It is made when the first object is.
#[derive(Clone)]
pub struct LocalStore {
    root: PathBuf,
    disk: Arc<dyn Disk>,
}

impl LocalStore {
    /// The store in `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self::on(Arc::new(OsDisk), root)
    }

    /// The store in `root` of a disk.
    pub fn on(disk: Arc<dyn Disk>, root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), disk }
    }

    /// Its folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Folders inside of the root that can hold objects.
    fn folders(&self) -> Result<Vec<String>> {
        let entries = self.entries(&self.root)?.into_iter();
        Ok(entries.filter(|entry| entry.is_dir && check_name(&entry.name).is_ok()).map(|e| e.name).collect())
    }

    fn entries(&self, folder: &Path) -> Result<Vec<DirEntry>> {
        match self.disk.list(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            listed => listed.map_err(Error::io("list", folder)),
        }
    }

    /// Syncs a folder after a removal and removes it if that left it empty.
    fn after_removal(&self, folder: &Path) -> Result<()> {
        match self.disk.sync_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            synced => synced.map_err(Error::io("sync", folder))?,
        }
        if folder != self.root && self.disk.remove_dir(folder).is_ok() {
            self.disk.sync_dir(&self.root).map_err(Error::io("sync", &self.root))?;
        }
        Ok(())
    }
}

impl Store for LocalStore {
    fn create(&self, name: &str) -> Result<Box<dyn Upload>> {
        check_name(name)?;
        let path = self.root.join(name);
        let (Some(folder), Some(file)) = (path.parent(), path.file_name()) else {
            return Err(Error::Name { name: name.into() });
        };
        ensure_dir(self.disk.as_ref(), folder)?;
        if self.entries(folder)?.iter().any(|entry| *entry.name == *file) {
            return Err(Error::Exists { path });
        }
        let temporary = folder.join(format!("{UNFINISHED}{}", file.to_string_lossy()));
        let file = self.disk.create(&temporary).map_err(Error::io("create", &temporary))?;
        Ok(Box::new(LocalUpload { disk: self.disk.clone(), temporary, path, file: Some(file), written: 0 }))
    }

    fn open(&self, name: &str) -> Result<Box<dyn Object>> {
        check_name(name)?;
        let path = self.root.join(name);
        let file = self.disk.open(&path).map_err(Error::io("open", &path))?;
        Ok(Box::new(LocalObject { path, file }))
    }

    fn list(&self) -> Result<Vec<ObjectInfo>> {
        let mut objects = Vec::new();
        let mut add = |prefix: &str, entries: Vec<DirEntry>| {
            let files = entries.into_iter().filter(|entry| !entry.is_dir && check_name(&entry.name).is_ok());
            objects.extend(
                files.map(|e| ObjectInfo { name: format!("{prefix}{}", e.name), size_bytes: e.size_bytes }),
            );
        };
        add("", self.entries(&self.root)?);
        for folder in self.folders()? {
            add(&format!("{folder}/"), self.entries(&self.root.join(&folder))?);
        }
        objects.sort();
        Ok(objects)
    }

    fn remove(&self, name: &str) -> Result<()> {
        check_name(name)?;
        let path = self.root.join(name);
        match self.disk.remove(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed.map_err(Error::io("remove", &path))?,
        }
        self.after_removal(path.parent().unwrap_or(&self.root))
    }

    fn remove_unfinished(&self) -> Result<usize> {
        let mut count = 0;
        let folders = self.folders()?.into_iter().map(|folder| self.root.join(folder));
        for folder in folders.chain([self.root.clone()]) {
            let entries = self.entries(&folder)?;
            for entry in entries.iter().filter(|entry| !entry.is_dir && entry.name.starts_with(UNFINISHED)) {
                let path = folder.join(&entry.name);
                self.disk.remove(&path).map_err(Error::io("remove", &path))?;
                count += 1;
            }
            if folder != self.root && entries.iter().all(|entry| entry.name.starts_with(UNFINISHED)) {
                self.after_removal(&folder)?;
            }
        }
        Ok(count)
    }

    fn locate(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

/// Makes a folder and those above it, each durable in its parent.
pub(crate) fn ensure_dir(disk: &dyn Disk, folder: &Path) -> Result<()> {
    let parent = folder.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
    match disk.create_dir(folder) {
        Ok(()) => {
            let parent = parent.unwrap_or(folder);
            disk.sync_dir(parent).map_err(Error::io("sync", parent))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && parent.is_some_and(|p| p != folder) => {
            ensure_dir(disk, parent.unwrap_or(folder))?;
            ensure_dir(disk, folder)
        }
        Err(error) => Err(Error::io("create", folder)(error)),
    }
}

struct LocalUpload {
    disk: Arc<dyn Disk>,
    temporary: PathBuf,
    path: PathBuf,
    /// Absent once the temporary name is gone.
    file: Option<Box<dyn WriteFile>>,
    written: u64,
}

impl Upload for LocalUpload {
    fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        while !bytes.is_empty() {
            let written = match file.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                written => written,
            };
            let written =
                written.map_err(Error::write("write", &self.path, self.written, bytes.len() as u64))?;
            self.written += written as u64;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        // Delayed allocation may find the disk full only now.
        file.sync().map_err(Error::write("sync", &self.path, 0, self.written))?;
        self.disk.rename(&self.temporary, &self.path).map_err(Error::io("rename to", &self.path))?;
        self.file = None;
        let folder = self.path.parent().unwrap_or(&self.path);
        self.disk.sync_dir(folder).map_err(Error::io("sync", folder))
    }
}

impl Drop for LocalUpload {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // Best effort: `remove_unfinished` takes what stays.
            let _ = self.disk.remove(&self.temporary);
        }
    }
}

struct LocalObject {
    path: PathBuf,
    file: Box<dyn ReadFile>,
}

impl Object for LocalObject {
    fn size_bytes(&self) -> u64 {
        self.file.size_bytes()
    }

    fn read_range(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) => {
                    let end = offset + done as u64;
                    let wanted = offset + buffer.len() as u64;
                    return Err(Error::damaged(
                        &self.path,
                        format!("it ends at byte {end}, wanted up to {wanted}"),
                    ));
                }
                read => done += read.map_err(Error::io("read", &self.path))?,
            }
        }
        Ok(())
    }
}
