//! The one error type of this crate.

use std::io;
use std::path::{Path, PathBuf};

use hgct_core::ids::Rank;
use hgct_core::slice::{Role, Slice};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with checkpoints, with where it went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The storage is full.
    #[error(
        "no space for {bytes} bytes at byte {offset} of {}: free some, or keep fewer checkpoints",
        path.display()
    )]
    NoSpace {
        /// The file that was being written.
        path: PathBuf,
        /// Bytes of it that were already written.
        offset: u64,
        /// Bytes that found no place; 0 where the file itself or its folder found none.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The operating system refused.
    #[error("cannot {operation} {}: {}", path.display(), source.kind())]
    Io {
        /// What was tried, such as `read`.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A committed file is never written over.
    #[error("{} is already there and is never overwritten", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A name that could leave the store's folder or hide in it.
    #[error(
        "{name:?} is no object name: use FOLDER/FILE of letters, digits, '-', '_' and '.', not starting with '.'"
    )]
    Name {
        /// What was found.
        name: String,
    },
    /// A file does not hold what its manifest or its own header says.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A document does not parse, or something is not supported yet.
    #[error(transparent)]
    Document(#[from] hgct_core::Error),
    /// A slice does not fit what was given with it.
    #[error("{role} {slice}: {reason}", role = role.name())]
    Slice {
        /// The slice.
        slice: Slice,
        /// Its role.
        role: Role,
        /// What does not fit.
        reason: String,
    },
    /// A piece of a shard came from a rank, or at a place, where none was expected.
    #[error("{rank}: a piece of {bytes} bytes at byte {offset} of its shard, expected {expected}")]
    Piece {
        /// Who sent it.
        rank: Rank,
        /// Where it says that it begins.
        offset: u64,
        /// Its length.
        bytes: u64,
        /// What would have been right.
        expected: String,
    },
    /// Not every rank has sent its shard.
    #[error("step {step}: no complete shard from {}", ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    Incomplete {
        /// The checkpoint.
        step: u64,
        /// Who is missing.
        ranks: Vec<Rank>,
    },
    /// The step has a checkpoint that verifies.
    #[error("step {step} is already committed in {}", path.display())]
    AlreadyCommitted {
        /// The step.
        step: u64,
        /// Its folder.
        path: PathBuf,
    },
    /// There is no such checkpoint.
    #[error("{} has no committed checkpoint{}", path.display(), step.map(|s| format!(" of step {s}")).unwrap_or_default())]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
        /// Which was wanted; absent: any.
        step: Option<u64>,
    },
    /// An export goes into a new or empty folder only.
    #[error("{} is not an empty folder: name one that is not there yet", path.display())]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// An export's tokenizer is not the one that the model was trained with.
    #[error("{} is not the tokenizer of the checkpoint: its SHA-256 is {found}, trained with {expected}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Hash of the file.
        found: String,
        /// Hash in the manifest.
        expected: String,
    },
}

impl Error {
    /// For `map_err`: an operation on a path that failed.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        Self::write(operation, path, 0, 0)
    }

    /// For `map_err`: writing `bytes` at `offset` of a file.
    pub(crate) fn write(
        operation: &'static str,
        path: &Path,
        offset: u64,
        bytes: u64,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { path: path.into(), offset, bytes, source }
            }
            io::ErrorKind::AlreadyExists => Self::Exists { path: path.into() },
            _ => Self::Io { operation, path: path.into(), source },
        }
    }

    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.into(), reason: reason.into() }
    }

    /// Whether it tells of the files' content, not of the way to them.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Document(_))
    }
}
