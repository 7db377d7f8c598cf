//! One command at a time trains a run.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use hgct_core::ids::RunId;

use super::resume::BadRun;
use crate::workspace::is_at;

/// Holds the folder of a run until it is dropped, or its process ends however.
pub(super) struct RunLock {
    _file: File,
}

impl RunLock {
    /// Takes the folder, made if it is not there; [`BadRun`] where another command has it.
    pub(super) fn take(folder: &Path, run: &RunId) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join("lock");
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let is_ours = match file.try_lock() {
            // Another command may have set the folder aside before it let go of it.
            Ok(()) => is_at(&file, &path),
            Err(TryLockError::WouldBlock) => false,
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        };
        if !is_ours {
            let reason = "is in use: another hgct trains it; wait for its end, or stop it".into();
            bail!(BadRun { run: run.clone(), reason });
        }
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_trained_by_one_command_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let (run, folder) = (RunId::new("one").unwrap(), folder.path().join("one"));
        let first = RunLock::take(&folder, &run).unwrap();
        let error = RunLock::take(&folder, &run).err().unwrap();
        assert!(error.is::<BadRun>() && error.to_string().starts_with("run one is in use"), "{error}");
        drop(first);
        RunLock::take(&folder, &run).unwrap();
    }
}
