//! The folder `.hgct`: environments, caches and runs, and what is kept there by content.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
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

/// Writes a file whole or not at all.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let folder = path.parent().with_context(|| format!("{} has no folder", path.display()))?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder.join(format!(".{name}.{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file =
            fs::OpenOptions::new().create(true).truncate(true).write(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write()
        .inspect_err(|_| drop(fs::remove_file(&temporary)))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

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
