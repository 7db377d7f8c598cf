//! A file by content hash: cut into blocks for the wire, and put together again where it arrives.
//!
//! One host has the file and sends [`Blocks`]; another, which knows hash and length, collects them
//! in an [`Incoming`], which appears under its final name only when the hash is right.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use hgct_core::canonical::Hash;
use sha2::{Digest as _, Sha256};

use crate::storage::sync_folder;
use crate::{Error, Result};

/// Largest block: the payload of one control frame.
pub const BLOCK_BYTES: u64 = 1 << 20;

/// A file read in blocks of fixed size, the last one shorter.
#[derive(Debug)]
pub struct Blocks {
    path: PathBuf,
    file: File,
    block_bytes: u64,
    bytes: u64,
}

/// A file that is being received.
#[derive(Debug)]
pub struct Incoming {
    target: PathBuf,
    temporary: PathBuf,
    file: File,
    sha256: Sha256,
    expected: Hash,
    received: u64,
    bytes: u64,
}

/// SHA-256 of bytes.
pub fn sha256_of(bytes: &[u8]) -> Hash {
    Hash::of_bytes(bytes)
}

/// SHA-256 and length of a file.
pub fn sha256_file(path: &Path) -> Result<(Hash, u64)> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let (mut sha256, mut bytes) = (Sha256::new(), 0);
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if n == 0 {
            return Ok((Hash::from_digest(&sha256.finalize()), bytes));
        }
        sha256.update(&buffer[..n]);
        bytes += n as u64;
    }
}

/// Opens a file to read it in blocks of `block_bytes` (at least 1).
pub fn blocks(path: &Path, block_bytes: u64) -> Result<Blocks> {
    if block_bytes == 0 {
        return Err(Error::Option { key: "block_bytes", found: "0".into(), allowed: "at least 1".into() });
    }
    let file = File::open(path).map_err(Error::io("open", path))?;
    let bytes = file.metadata().map_err(Error::io("look at", path))?.len();
    Ok(Blocks { path: path.into(), file, block_bytes, bytes })
}

impl Blocks {
    /// Number of blocks.
    pub fn len(&self) -> u64 {
        self.bytes.div_ceil(self.block_bytes)
    }

    /// True for an empty file.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Bytes of the whole file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// First byte and content of block `index`; empty past the end.
    pub fn read(&self, index: u64) -> Result<(u64, Vec<u8>)> {
        let offset = index.saturating_mul(self.block_bytes).min(self.bytes);
        let mut block = vec![0; self.block_bytes.min(self.bytes - offset) as usize];
        self.file.read_exact_at(&mut block, offset).map_err(Error::io("read", &self.path))?;
        Ok((offset, block))
    }
}

impl Incoming {
    /// Starts to receive `bytes` bytes with hash `expected` into `folder`, under the hash as name.
    /// `None` where the file is already there and verified: nothing need be sent.
    pub fn begin(folder: &Path, expected: &Hash, bytes: u64) -> Result<Option<Self>> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let target = Self::path_of(folder, expected);
        if target.is_file() && sha256_file(&target)? == (expected.clone(), bytes) {
            return Ok(None);
        }
        let process = std::process::id();
        let temporary = folder.join(format!(".incoming-{}-{process}", expected.as_str()));
        let file = File::create(&temporary).map_err(Error::io("create", &temporary))?;
        let (sha256, expected) = (Sha256::new(), expected.clone());
        Ok(Some(Self { target, temporary, file, sha256, expected, received: 0, bytes }))
    }

    /// Where a file with this content lies in `folder`.
    pub fn path_of(folder: &Path, sha256: &Hash) -> PathBuf {
        folder.join(sha256.as_str())
    }

    /// First byte that is still missing.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Adds the block that starts at byte `offset`; blocks come in order.
    pub fn push(&mut self, offset: u64, block: &[u8]) -> Result<()> {
        let bytes = block.len() as u64;
        if offset != self.received || bytes > self.bytes - self.received {
            return Err(Error::Block {
                path: self.target.clone(),
                offset,
                bytes,
                received: self.received,
                total: self.bytes,
            });
        }
        self.file.write_all(block).map_err(Error::io("write", &self.temporary))?;
        self.sha256.update(block);
        self.received += bytes;
        Ok(())
    }

    /// Verifies the content and gives the file its name; returns its path.
    pub fn finish(self) -> Result<PathBuf> {
        if self.received != self.bytes {
            return Err(Error::Block {
                path: self.target.clone(),
                offset: self.received,
                bytes: 0,
                received: self.received,
                total: self.bytes,
            });
        }
        let found = Hash::from_digest(&self.sha256.clone().finalize());
        if found != self.expected {
            let expected = self.expected.clone();
            return Err(Error::HashMismatch { path: self.target.clone(), expected, found });
        }
        self.file.sync_all().map_err(Error::io("write", &self.temporary))?;
        let rename = fs::rename(&self.temporary, &self.target);
        rename.map_err(Error::io("rename to", &self.target))?;
        if let Some(folder) = self.target.parent() {
            sync_folder(folder)?;
        }
        Ok(self.target.clone())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // After `finish` the name is gone; otherwise what is there is of no use.
        let _ = fs::remove_file(&self.temporary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn blocks_rebuild_the_file(
            content in proptest::collection::vec(any::<u8>(), 0..2000),
            size in 1u64..700,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let source = folder.path().join("source");
            fs::write(&source, &content).unwrap();
            let (hash, bytes) = sha256_file(&source).unwrap();
            prop_assert_eq!(&hash, &sha256_of(&content));
            let target = folder.path().join("store");
            let mut incoming = Incoming::begin(&target, &hash, bytes).unwrap().unwrap();
            let blocks = blocks(&source, size).unwrap();
            for index in 0..blocks.len() {
                let (offset, block) = blocks.read(index).unwrap();
                incoming.push(offset, &block).unwrap();
            }
            prop_assert_eq!(fs::read(incoming.finish().unwrap()).unwrap(), content);
            prop_assert!(Incoming::begin(&target, &hash, bytes).unwrap().is_none());
            prop_assert_eq!(fs::read_dir(&target).unwrap().count(), 1);
        }
    }

    #[test]
    fn wrong_blocks_leave_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let begin = || Incoming::begin(folder.path(), &sha256_of(b"abcd"), 4).unwrap().unwrap();
        let mut gap = begin();
        assert!(matches!(gap.push(1, b"b"), Err(Error::Block { offset: 1, received: 0, .. })));
        drop(gap);
        let mut long = begin();
        assert!(matches!(long.push(0, b"abcde"), Err(Error::Block { bytes: 5, total: 4, .. })));
        drop(long);
        let mut short = begin();
        short.push(0, b"abc").unwrap();
        assert!(matches!(short.finish(), Err(Error::Block { received: 3, .. })));
        let mut tampered = begin();
        tampered.push(0, b"abcx").unwrap();
        assert!(matches!(tampered.finish(), Err(Error::HashMismatch { .. })));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_file_is_received_again() {
        let folder = tempfile::tempdir().unwrap();
        let hash = sha256_of(b"abcd");
        fs::write(Incoming::path_of(folder.path(), &hash), b"abcx").unwrap();
        let mut incoming = Incoming::begin(folder.path(), &hash, 4).unwrap().unwrap();
        incoming.push(0, b"abcd").unwrap();
        assert_eq!(fs::read(incoming.finish().unwrap()).unwrap(), b"abcd");
    }
}
