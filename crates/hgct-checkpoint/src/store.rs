//! The storage interface. Its shape is that of an object store: named objects that appear whole or
//! not at all, ranged reads, listing; no append, no rename.

use std::path::PathBuf;

use crate::{Error, Result};

/// A committed object, as listed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectInfo {
    /// `FILE` or `FOLDER/FILE`.
    pub name: String,
    /// Its length.
    pub size_bytes: u64,
}

/// Where objects are kept. Calls block; whoever must not wait calls from a thread of its own.
pub trait Store: Send + Sync {
    /// Begins an object. Nobody sees it before [`Upload::commit`]; dropped without, it is gone.
    /// [`Error::Exists`] where there is one of this name.
    fn create(&self, name: &str) -> Result<Box<dyn Upload>>;
    /// Opens a committed object.
    fn open(&self, name: &str) -> Result<Box<dyn Object>>;
    /// All committed objects, by name.
    fn list(&self) -> Result<Vec<ObjectInfo>>;
    /// Removes an object durably; it is no error if it is not there.
    fn remove(&self, name: &str) -> Result<()>;
    /// Removes what uploads left that were neither committed nor dropped, because their process
    /// ended. To be called while no upload is under way; returns how many.
    fn remove_unfinished(&self) -> Result<usize>;
    /// Where an object is, for messages.
    fn locate(&self, name: &str) -> PathBuf;
}

/// An object being written, front to back.
pub trait Upload: Send {
    /// Appends all of `bytes`.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    /// Makes the object visible and durable. Where this fails it may be visible all the same.
    fn commit(self: Box<Self>) -> Result<()>;
}

/// An object being read.
pub trait Object: Send {
    /// Its length.
    fn size_bytes(&self) -> u64;
    /// Fills `buffer` from `offset`. [`Error::Damaged`] where the object ends before.
    fn read_range(&mut self, offset: u64, buffer: &mut [u8]) -> Result<()>;
}

/// Refuses names that are not plain: nothing in a document can lead out of the store.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |part: &str| {
        !part.is_empty()
            && part.len() <= 128
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    if name.split('/').count() <= 2 && name.split('/').all(plain) {
        Ok(())
    } else {
        Err(Error::Name { name: name.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_pass() {
        for good in ["a", "step-00000020/shard-r0.safetensors"] {
            check_name(good).unwrap();
        }
        for bad in ["", "/a", "a/", "../a", "a/..", "a/b/c", "a//b", ".a", "a b", "a\0"] {
            check_name(bad).unwrap_err();
        }
    }
}
