//! The folder `.hgct`: environments, caches and runs, and what is kept there by content.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use hgct_core::canonical::{self, Hash};
use hgct_core::ids::RunId;
use serde::{Deserialize, Serialize};

/// Where everything of hgct lies on this host.
#[derive(Debug, Clone)]
pub(crate) struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// The folder, made if it is not there.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).with_context(|| format!("cannot make the folder {}", root.display()))?;
        let root = root.canonicalize().with_context(|| format!("cannot find {}", root.display()))?;
        Ok(Self { root })
    }

    /// The folder itself.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Prepared data.
    pub(crate) fn data(&self) -> PathBuf {
        self.root.join("cache/data")
    }

    /// The folder of a run.
    pub(crate) fn run(&self, run: &RunId) -> PathBuf {
        self.root.join("runs").join(run.as_str())
    }

    /// A file that a run has once its training begins.
    pub(crate) const BEGUN: &str = "metrics.jsonl";

    /// Takes the folder of a run that never came to train out of the runs, with what it logged;
    /// answers with its new place.
    pub(crate) fn never_began(&self, folder: &Path) -> Result<PathBuf> {
        let sessions = self.root.join("sessions");
        let place = sessions.join(folder.file_name().unwrap_or_default());
        fs::create_dir_all(&sessions).with_context(|| format!("cannot make {}", sessions.display()))?;
        if place.exists() {
            fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
        }
        fs::rename(folder, &place)
            .with_context(|| format!("cannot move {} to {}", folder.display(), place.display()))?;
        Ok(place)
    }

    /// Finds a run by its id, by `latest` (the newest that came to train), or by its path.
    pub(crate) fn find_run(&self, name: &str) -> Result<PathBuf> {
        let runs = self.root.join("runs");
        if name == "latest" {
            let mut ids: Vec<PathBuf> = fs::read_dir(&runs)
                .map(|entries| {
                    entries
                        .flatten()
                        .map(|entry| entry.path())
                        .filter(|path| path.join(Self::BEGUN).is_file())
                        .collect()
                })
                .unwrap_or_default();
            ids.sort();
            return ids.pop().with_context(|| format!("there is no run under {}", runs.display()));
        }
        [runs.join(name), PathBuf::from(name)].into_iter().find(|path| path.is_dir()).with_context(|| {
            format!("there is no run {name:?} under {}: `latest` names the newest", runs.display())
        })
    }

    /// A document kept under a key, if it is there and reads.
    pub(crate) fn cached<T: for<'de> Deserialize<'de>>(&self, what: &str, key: &Hash) -> Option<T> {
        let path = self.cache_path(what, key);
        let text = fs::read_to_string(&path).ok()?;
        canonical::decode(&path.to_string_lossy(), &text).ok()
    }

    /// Keeps a document under a key.
    pub(crate) fn keep<T: Serialize>(&self, what: &str, key: &Hash, document: &T) -> Result<()> {
        write_atomically(&self.cache_path(what, key), canonical::encode(document).as_bytes(), 0o644)
    }

    fn cache_path(&self, what: &str, key: &Hash) -> PathBuf {
        self.root.join("cache").join(what).join(format!("{key}.json"))
    }
}

/// Whether the file that is open is still the one at the path: one that was locked may have been
/// renamed before the lock was there.
pub(crate) fn is_at(file: &fs::File, path: &Path) -> bool {
    let (Ok(open), Ok(there)) = (file.metadata(), fs::metadata(path)) else { return false };
    (open.dev(), open.ino()) == (there.dev(), there.ino())
}

/// Writes a file whole or not at all. A symbolic link stays, and the file that it names is replaced; a
/// device, FIFO or the like is never replaced but written to.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let write = || -> io::Result<()> {
        match fs::metadata(path) {
            Ok(found) if !found.is_file() => fs::OpenOptions::new().write(true).open(path)?.write_all(bytes),
            Ok(_) => replace(&path.canonicalize()?, bytes, mode),
            // A link to nothing: it is not known what was meant.
            Err(error) if path.is_symlink() => Err(error),
            Err(_) => replace(path, bytes, mode),
        }
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Puts a file in the place of another, or where there is none, by a rename.
fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "this is no name of a file"));
    };
    fs::create_dir_all(folder)?;
    let temporary = folder.join(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    let write = || -> io::Result<()> {
        let mut file =
            fs::OpenOptions::new().create(true).truncate(true).write(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| drop(fs::remove_file(&temporary)))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::FileTypeExt as _;

    use super::*;

    #[test]
    fn a_link_stays_and_the_file_that_it_names_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let [file, link, nothing] = ["deep/file", "link", "nothing"].map(|name| folder.path().join(name));
        write_atomically(&file, b"first", 0o644).unwrap();
        std::os::unix::fs::symlink("deep/file", &link).unwrap();
        write_atomically(&link, b"second", 0o644).unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"second");
        std::os::unix::fs::symlink("gone", &nothing).unwrap();
        assert!(write_atomically(&nothing, b"third", 0o644).is_err());
        assert!(nothing.is_symlink());
    }

    #[test]
    fn what_is_no_file_is_written_to_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let [fifo, link] = ["fifo", "link"].map(|name| folder.path().join(name));
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        std::os::unix::fs::symlink("fifo", &link).unwrap();
        for path in [&fifo, &link] {
            // Open for both, so that no side waits for the other, and what replaced it would be told.
            let mut both = fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
            write_atomically(path, b"bytes", 0o644).unwrap();
            assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
            let mut found = [0; 5];
            both.read_exact(&mut found).unwrap();
            assert_eq!(&found, b"bytes");
        }
        assert!(link.is_symlink());
        assert!(write_atomically(folder.path(), b"bytes", 0o644).is_err());
    }

    #[test]
    fn the_latest_run_is_one_that_came_to_train() {
        let folder = tempfile::tempdir().unwrap();
        let workspace = Workspace::open(folder.path()).unwrap();
        assert!(workspace.find_run("latest").unwrap_err().to_string().contains("there is no run"));
        for name in ["1", "2", "3"] {
            fs::create_dir_all(workspace.run(&RunId::new(name).unwrap())).unwrap();
        }
        assert!(workspace.find_run("latest").is_err());
        let [second, third] = ["2", "3"].map(|name| workspace.run(&RunId::new(name).unwrap()));
        fs::write(second.join(Workspace::BEGUN), "").unwrap();
        assert_eq!(workspace.find_run("latest").unwrap(), second);
        for words in ["first", "second"] {
            fs::create_dir_all(&third).unwrap();
            fs::write(third.join("log"), words).unwrap();
            let place = workspace.never_began(&third).unwrap();
            assert!(!third.exists());
            assert_eq!(fs::read_to_string(place.join("log")).unwrap(), words);
        }
    }
}
