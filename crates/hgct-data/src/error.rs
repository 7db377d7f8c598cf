//! The one error type of this crate.

use std::io;
use std::path::{Path, PathBuf};

use hgct_core::canonical::Hash;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can be wrong with text, tokenizers, options and token files, with where it was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {operation} {}{}", path.display(), hint(source))]
    Io {
        /// What was tried, such as `read`.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A path or pattern of the sources leads to no text at all.
    #[error("data source `{pattern}` matches no file{}", looked_in(pattern, base))]
    NoMatch {
        /// As written in the job.
        pattern: String,
        /// The folder that it is relative to.
        base: PathBuf,
    },
    /// A pattern of the sources is not a glob.
    #[error("data source `{pattern}` is not a glob: {reason}; allowed are `*`, `**`, `?`, `[ab]`, `{{a,b}}`")]
    Glob {
        /// As written in the job.
        pattern: String,
        /// What the parser said.
        reason: String,
    },
    /// A file that holds no text.
    #[error("{} is empty: name a file with text, or take it out of the data paths", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A file that is not UTF-8 text.
    #[error("{}, line {line}: {found} at byte {offset}: data files are UTF-8 text or JSONL; name only such files, by a glob like `{}` where a folder has others", path.display(), glob_beside(path))]
    NotText {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// Byte in the file, from 0.
        offset: u64,
        /// What was found instead of text.
        found: &'static str,
    },
    /// A line of a JSONL file that is not an object with a `text` string.
    #[error("{}, line {line}: {reason}; each line is an object with a string `text`", path.display())]
    Jsonl {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// What was found.
        reason: String,
    },
    /// A file changed while it was read.
    #[error("{} changed while it was read: run again when nothing writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A tokenizer that does not load, train or encode.
    #[error("tokenizer {}: {reason}", path.display())]
    Tokenizer {
        /// The `tokenizer.json`.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An option with a value that it may not have.
    #[error("{key} is {found}, but must be {allowed}")]
    Option {
        /// The option.
        key: &'static str,
        /// What was found.
        found: String,
        /// What is allowed.
        allowed: String,
    },
    /// Less text than one sample takes.
    #[error(
        "{what} has {tokens} tokens, but {needed} are needed: give more text, or a smaller seq_len or held_out"
    )]
    TooFewTokens {
        /// The token file, or what would become one.
        what: String,
        /// Tokens found.
        tokens: u64,
        /// Tokens needed.
        needed: u64,
    },
    /// A file that is not a token file, or a damaged one.
    #[error("token file {}: {reason}: remove it and prepare the data again", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        reason: String,
    },
    /// Content that is not what its hash says.
    #[error("{} has sha256 {found}, expected {expected}: fetch or prepare it again", path.display())]
    HashMismatch {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: Hash,
        /// What it is.
        found: Hash,
    },
    /// A block that does not continue the file being received.
    #[error("block for {} starts at byte {offset} with {bytes} bytes, but {received} of {total} bytes are there: send the blocks in order", path.display())]
    Block {
        /// The file being received.
        path: PathBuf,
        /// First byte of the block.
        offset: u64,
        /// Bytes in the block.
        bytes: u64,
        /// Bytes received so far.
        received: u64,
        /// Bytes of the whole file.
        total: u64,
    },
    /// No sources of crates where they should be.
    #[error("no Rust crate sources under {}: build once with cargo (it fetches them), or name other text with --data", path.display())]
    NoCrates {
        /// The folder that was searched.
        path: PathBuf,
    },
}

impl Error {
    /// For `map_err` on an I/O result.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, path: path.into(), source }
    }

    /// True where the cause is a full disk or an exhausted quota.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if disk_full(source))
    }
}

fn disk_full(source: &io::Error) -> bool {
    matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn hint(source: &io::Error) -> &'static str {
    if disk_full(source) {
        ": no space is left on this file system; free some or choose another folder (nothing was written over)"
    } else {
        ""
    }
}

/// Where a pattern was looked for; an absolute one says so itself.
fn looked_in(pattern: &str, base: &Path) -> String {
    if Path::new(pattern).is_absolute() { String::new() } else { format!(" (looked in {})", base.display()) }
}

fn glob_beside(path: &Path) -> String {
    let folder = path.parent().unwrap_or(Path::new("")).display().to_string();
    format!("{folder}/**/*.txt")
}
