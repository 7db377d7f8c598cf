//! Contents by hash: job, tokenizer and token files, as they come over the wire.
//!
//! A content grows in `HASH.partial`, also over several connections, and gets its name only when its
//! bytes have its hash; a worker opens nothing else. Agents may share the folder: who grows a content
//! holds a lock on its file, and another one that needs it meanwhile grows it beside, under its own
//! process's name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use hgct_core::canonical::Hash;
use sha2::{Digest as _, Sha256};

use super::budget::Budget;
use crate::workspace::is_at;

/// What the agent asks of its store.
#[derive(Debug)]
pub(super) enum Request {
    /// How much of a content is there?
    Look {
        /// Which.
        hash: Hash,
        /// Its length.
        size_bytes: u64,
    },
    /// A piece of a content that was looked for.
    Piece {
        /// Which.
        hash: Hash,
        /// Where it begins.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

/// What the store answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct State {
    /// Which content.
    pub(super) hash: Hash,
    /// All of it is there, verified.
    pub(super) complete: bool,
    /// Bytes that are there.
    pub(super) size_bytes: u64,
}

/// Starts the store's thread over `folder`. `answer` hears states, or why the disk fails; bytes of
/// pieces go back to `window` as they are written.
pub(super) fn start(
    folder: PathBuf,
    window: Arc<Budget>,
    mut answer: impl FnMut(Result<State, String>) + Send + 'static,
) -> io::Result<Sender<Request>> {
    fs::create_dir_all(&folder)?;
    let (sender, requests) = channel();
    let serve = move || {
        let mut store = Store { folder, growing: BTreeMap::new(), verified: BTreeSet::new() };
        for request in requests {
            let bytes = if let Request::Piece { bytes, .. } = &request { bytes.len() } else { 0 };
            match store.serve(request) {
                Ok(None) => {}
                Ok(Some(state)) => answer(Ok(state)),
                Err(error) => answer(Err(format!("the content store {}: {error}", store.folder.display()))),
            }
            window.give(bytes);
        }
    };
    std::thread::Builder::new().name("hgct-blobs".into()).spawn(serve)?;
    Ok(sender)
}

struct Store {
    folder: PathBuf,
    growing: BTreeMap<Hash, Growing>,
    /// Contents that this process has read or written itself.
    verified: BTreeSet<Hash>,
}

struct Growing {
    path: PathBuf,
    /// Locked.
    file: File,
    hasher: Sha256,
    length: u64,
    size_bytes: u64,
}

impl Store {
    fn serve(&mut self, request: Request) -> io::Result<Option<State>> {
        match request {
            Request::Look { hash, size_bytes } => self.look(hash, size_bytes).map(Some),
            Request::Piece { hash, offset, bytes } => self.piece(hash, offset, &bytes),
        }
    }

    fn look(&mut self, hash: Hash, size_bytes: u64) -> io::Result<State> {
        let whole = self.folder.join(hash.as_str());
        if fs::metadata(&whole).is_ok_and(|about| about.is_file() && about.len() == size_bytes)
            && (self.verified.contains(&hash) || hash_of_file(&whole)? == hash)
        {
            self.verified.insert(hash.clone());
            return Ok(State { hash, complete: true, size_bytes });
        }
        if !self.growing.contains_key(&hash) {
            let growing = self.grow(&hash, size_bytes)?;
            self.growing.insert(hash.clone(), growing);
        }
        self.settle(hash)
    }

    fn piece(&mut self, hash: Hash, offset: u64, bytes: &[u8]) -> io::Result<Option<State>> {
        let Some(growing) = self.growing.get_mut(&hash) else { return Ok(None) };
        if offset != growing.length || bytes.len() as u64 > growing.size_bytes - growing.length {
            // What is there already may come again; a gap is answered with where to go on.
            return if offset < growing.length { Ok(None) } else { self.settle(hash).map(Some) };
        }
        if let Err(error) = growing.file.write_all(bytes) {
            // How much of it was written is unknown: read it again when it is asked for again.
            self.growing.remove(&hash);
            return Err(error);
        }
        growing.hasher.update(bytes);
        growing.length += bytes.len() as u64;
        if growing.length < growing.size_bytes { Ok(None) } else { self.settle(hash).map(Some) }
    }

    /// The state of a growing content, which gets its name if it is whole.
    fn settle(&mut self, hash: Hash) -> io::Result<State> {
        let Some(growing) = self.growing.get_mut(&hash) else {
            return Ok(State { hash, complete: false, size_bytes: 0 });
        };
        if growing.length < growing.size_bytes {
            return Ok(State { complete: false, size_bytes: growing.length, hash });
        }
        let size_bytes = growing.size_bytes;
        if Hash::from_digest(&growing.hasher.clone().finalize()) == hash {
            fs::rename(&growing.path, self.folder.join(hash.as_str()))?;
            self.growing.remove(&hash);
            self.verified.insert(hash.clone());
            return Ok(State { hash, complete: true, size_bytes });
        }
        eprintln!(
            "hgct agent: content {} came with other bytes than its hash; from the beginning",
            hash.short()
        );
        growing.restart()?;
        Ok(State { hash, complete: false, size_bytes: 0 })
    }

    /// Goes on with what an earlier connection left, unless another process does.
    fn grow(&self, hash: &Hash, size_bytes: u64) -> io::Result<Growing> {
        if let Some(growing) = Growing::open(self.folder.join(format!("{hash}.partial")), size_bytes)? {
            return Ok(growing);
        }
        let own = self.folder.join(format!("{hash}.{}.partial", std::process::id()));
        Growing::open(own, size_bytes)?.ok_or_else(|| {
            io::Error::new(io::ErrorKind::WouldBlock, format!("{} is being written", hash.short()))
        })
    }
}

impl Growing {
    /// What an earlier connection left, or nothing; `None` where another process has the file.
    fn open(path: PathBuf, size_bytes: u64) -> io::Result<Option<Self>> {
        loop {
            let file = OpenOptions::new().read(true).append(true).create(true).open(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // Whoever had it before the lock was taken may have given the file its name since.
            if !is_at(&file, &path) {
                continue;
            }
            let length = file.metadata()?.len();
            let mut growing = Self { path, file, hasher: Sha256::new(), length, size_bytes };
            if growing.length > size_bytes {
                growing.restart()?;
            } else {
                feed(&mut growing.hasher, &mut growing.file)?;
            }
            return Ok(Some(growing));
        }
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.hasher = Sha256::new();
        self.length = 0;
        Ok(())
    }
}

fn hash_of_file(path: &Path) -> io::Result<Hash> {
    let mut hasher = Sha256::new();
    feed(&mut hasher, &mut File::open(path)?)?;
    Ok(Hash::from_digest(&hasher.finalize()))
}

fn feed(hasher: &mut Sha256, file: &mut File) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(folder: &Path) -> Store {
        Store { folder: folder.to_owned(), growing: BTreeMap::new(), verified: BTreeSet::new() }
    }

    fn look(store: &mut Store, content: &[u8]) -> (bool, u64) {
        let request = Request::Look { hash: Hash::of_bytes(content), size_bytes: content.len() as u64 };
        let state = store.serve(request).unwrap().unwrap();
        (state.complete, state.size_bytes)
    }

    fn piece(store: &mut Store, content: &[u8], offset: usize, bytes: &[u8]) -> Option<(bool, u64)> {
        let request =
            Request::Piece { hash: Hash::of_bytes(content), offset: offset as u64, bytes: bytes.to_vec() };
        store.serve(request).unwrap().map(|state| (state.complete, state.size_bytes))
    }

    #[test]
    fn a_content_goes_on_where_it_was_cut() {
        let folder = tempfile::tempdir().unwrap();
        let content = b"some tokens of a text";
        let mut first = store(folder.path());
        assert_eq!(look(&mut first, content), (false, 0));
        assert_eq!(piece(&mut first, content, 0, &content[..5]), None);
        drop(first);
        let mut second = store(folder.path());
        assert_eq!(look(&mut second, content), (false, 5));
        assert_eq!(piece(&mut second, content, 0, &content[..5]), None, "what is there may come again");
        assert_eq!(
            piece(&mut second, content, 9, &content[9..]),
            Some((false, 5)),
            "a gap says where to go on"
        );
        assert_eq!(piece(&mut second, content, 5, &content[5..]), Some((true, 21)));
        assert_eq!(fs::read(folder.path().join(Hash::of_bytes(content).as_str())).unwrap(), content);
        assert_eq!(look(&mut store(folder.path()), content), (true, 21));
    }

    #[test]
    fn two_agents_that_share_the_folder_do_not_mix_their_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let content = b"some tokens of a text";
        let [mut first, mut second] = [(); 2].map(|()| store(folder.path()));
        assert_eq!(look(&mut first, content), (false, 0));
        assert_eq!(look(&mut second, content), (false, 0));
        for (begin, end) in [(0, 9), (9, 15)] {
            for store in [&mut first, &mut second] {
                assert_eq!(piece(store, content, begin, &content[begin..end]), None);
            }
        }
        for store in [&mut first, &mut second] {
            assert_eq!(piece(store, content, 15, &content[15..]), Some((true, 21)));
            assert_eq!(fs::read(folder.path().join(Hash::of_bytes(content).as_str())).unwrap(), content);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing partial is left");
    }

    #[test]
    fn wrong_bytes_never_get_the_name() {
        let folder = tempfile::tempdir().unwrap();
        let content = b"right";
        let mut store = store(folder.path());
        look(&mut store, content);
        assert_eq!(piece(&mut store, content, 0, b"wrong"), Some((false, 0)));
        assert_eq!(piece(&mut store, content, 0, b"right and more"), Some((false, 0)), "more than announced");
        assert_eq!(piece(&mut store, content, 0, content), Some((true, 5)));
        // Changed behind our back: seen by the next process.
        fs::write(folder.path().join(Hash::of_bytes(content).as_str()), b"wrong").unwrap();
        let mut next = super::tests::store(folder.path());
        assert_eq!(look(&mut next, content), (false, 0));
        assert_eq!(piece(&mut next, content, 0, content), Some((true, 5)));
    }

    #[test]
    fn an_empty_content_is_complete_at_once() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(look(&mut store(folder.path()), b""), (true, 0));
    }

    #[test]
    fn a_full_disk_is_an_error_and_not_a_torn_content() {
        let folder = tempfile::tempdir().unwrap();
        let content = b"content";
        let path = folder.path().join(format!("{}.partial", Hash::of_bytes(content)));
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let mut store = store(folder.path());
        // Opened by hand, since this device has no end to read.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let growing = Growing { path, file, hasher: Sha256::new(), length: 0, size_bytes: 7 };
        store.growing.insert(Hash::of_bytes(content), growing);
        let request = Request::Piece { hash: Hash::of_bytes(content), offset: 0, bytes: content.to_vec() };
        assert_eq!(store.serve(request).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(!folder.path().join(Hash::of_bytes(content).as_str()).exists());
    }
}
