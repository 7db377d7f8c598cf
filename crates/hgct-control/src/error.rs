//! The one error type of this crate.

use hgct_core::ids::{Generation, RunId};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can be wrong with bytes, messages and tokens that come from outside.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A frame announces more than a frame may have.
    #[error("a frame announces a {part} of {bytes} bytes, but {limit} are allowed: close the connection")]
    TooLong {
        /// `header` or `payload`.
        part: &'static str,
        /// Bytes announced.
        bytes: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// A frame's header is no message.
    #[error("a frame's header is no message of this protocol ({message}): close the connection")]
    Header {
        /// What the parser said.
        message: String,
    },
    /// The other side speaks another version.
    #[error(
        "the other side speaks protocol {theirs}, this hgct speaks {ours}: install the same hgct on both"
    )]
    Protocol {
        /// Their version.
        theirs: u32,
        /// Our version.
        ours: u32,
    },
    /// A message belongs to another run.
    #[error("a message of run {theirs} came over a connection of run {ours}: close the connection")]
    Run {
        /// The run in the message.
        theirs: String,
        /// The connection's run.
        ours: RunId,
    },
    /// A message is missing, or came twice.
    #[error("message {found} came where message {expected} comes next: close the connection")]
    Sequence {
        /// Number in the message.
        found: u64,
        /// The number that comes next.
        expected: u64,
    },
    /// A message belongs to a generation that is over.
    #[error("a message of {theirs} is fenced: this side is in {ours}")]
    Fenced {
        /// The message's generation.
        theirs: Generation,
        /// The receiver's generation.
        ours: Generation,
    },
    /// Bytes before authentication that are not the handshake.
    #[error("handshake: {found}: is this a port of hgct?")]
    NotHandshake {
        /// What was found.
        found: String,
    },
    /// The other side could not prove that it has the token.
    #[error("handshake: the other side does not have this run's token: give both sides the same token file")]
    Token,
    /// The other side refused this one.
    #[error("handshake: the other side refused: {reason}")]
    Refused {
        /// Why, in its words.
        reason: &'static str,
    },
    /// The token file's text is no token.
    #[error("the token {found}: write {allowed} into the token file")]
    BadToken {
        /// What was found (never the token).
        found: String,
        /// What is allowed.
        allowed: &'static str,
    },
}
