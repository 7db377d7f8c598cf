//! The one error type of this crate.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use hgct_core::dtype::MemoryKind;
use hgct_core::ids::{Generation, Rank};

use crate::tag::Tag;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What was being done when something failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// The rank that reports.
    pub rank: Rank,
    /// The other rank, where there is one.
    pub peer: Option<Rank>,
    /// The call.
    pub operation: Operation,
    /// The message, where it is about one.
    pub tag: Option<Tag>,
    /// The communicator's generation.
    pub generation: Generation,
    /// Number of the frame on its connection, or of the collective.
    pub sequence: Option<u64>,
    /// Bytes of the message, or those that had arrived, where known.
    pub bytes: Option<u64>,
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rank, self.operation.name())?;
        if let Some(peer) = self.peer {
            write!(f, " with {peer}")?;
        }
        if let Some(tag) = self.tag {
            write!(f, ", {tag}")?;
        }
        if let Some(sequence) = self.sequence {
            write!(f, ", sequence {sequence}")?;
        }
        if let Some(bytes) = self.bytes {
            write!(f, ", {bytes} bytes")?;
        }
        write!(f, ", {}", self.generation)
    }
}

/// The calls of a communicator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Making the connections.
    Connect,
    /// Sending a message.
    Send,
    /// Receiving a message.
    Receive,
    /// All-reduce of scalars.
    AllReduce,
    /// Barrier.
    Barrier,
    /// Reduction to an owner.
    Reduce,
    /// Gather from an owner.
    Gather,
    /// Measuring a link.
    Measure,
    /// Leaving in order.
    Close,
}

impl Operation {
    /// The name used in errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Send => "send",
            Self::Receive => "receive",
            Self::AllReduce => "all-reduce",
            Self::Barrier => "barrier",
            Self::Reduce => "reduce to owner",
            Self::Gather => "gather from owner",
            Self::Measure => "measure link",
            Self::Close => "close",
        }
    }
}

/// Why the other side of a connection would not have us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// It speaks another protocol version.
    Version {
        /// Its version.
        theirs: u16,
    },
    /// It does not accept our proof: the keys differ.
    Key,
    /// It belongs to another generation.
    Generation {
        /// Its generation.
        theirs: Generation,
    },
    /// It belongs to another run.
    Run,
    /// Our rank is not in its group, or it is not the rank that we meant.
    Rank,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version { theirs } => {
                write!(f, "it speaks protocol version {theirs}, this side {}", crate::wire::PROTOCOL_VERSION)
            }
            Self::Key => f.write_str("the keys differ"),
            Self::Generation { theirs } => write!(f, "it belongs to {theirs}"),
            Self::Run => f.write_str("it belongs to another run"),
            Self::Rank => f.write_str("the ranks do not fit its group"),
        }
    }
}

/// What can go wrong between workers, with where it went wrong.
///
/// Errors are cheap to clone, because a communicator repeats its first one until it is replaced.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A listener cannot have its address.
    #[error(
        "cannot listen on {address}: choose a free port (0 lets the system choose) and an address of this host"
    )]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The options of a connect contradict themselves.
    #[error("cannot connect: {found}, but {allowed}")]
    Options {
        /// What was found.
        found: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// The group was not complete in time.
    #[error(
        "{context}: no connection with {}{}: see whether they started and can be reached",
        list(missing),
        seen(refused)
    )]
    Incomplete {
        /// What was being done.
        context: Box<Context>,
        /// The ranks without a connection.
        missing: Vec<Rank>,
        /// What was turned away meanwhile, at most a few lines.
        refused: Vec<String>,
    },
    /// The other side refused the connection.
    #[error("{context}: {address} refused the connection: {refusal}")]
    Refused {
        /// What was being done.
        context: Box<Context>,
        /// Who refused.
        address: SocketAddr,
        /// Why.
        refusal: Refusal,
    },
    /// One side could not prove to the other that it has the key of the run.
    #[error(
        "{context}: {address} and this side do not have the same key: start both with the token of this run"
    )]
    WrongKey {
        /// What was being done.
        context: Box<Context>,
        /// Who failed.
        address: SocketAddr,
    },
    /// The peer's process or host is gone, or it broke the connection off.
    #[error("{context}: the peer is dead, its connection ended without a goodbye")]
    PeerDead {
        /// What was being done.
        context: Box<Context>,
        /// What the connection said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The peer left in order and will neither send nor receive any more.
    #[error("{context}: the peer has left")]
    PeerLeft {
        /// What was being done.
        context: Box<Context>,
    },
    /// A wait reached its deadline.
    #[error("{context}: the deadline passed after {} ms", waited_ns / 1_000_000)]
    Deadline {
        /// What was being done.
        context: Box<Context>,
        /// How long it was waited for.
        waited_ns: u64,
    },
    /// The queue to a peer was full until the deadline.
    #[error(
        "{context}: the queue to the peer holds {queued_bytes} bytes of {limit_bytes} allowed and did not empty in time"
    )]
    QueueFull {
        /// What was being done.
        context: Box<Context>,
        /// Bytes in the queue.
        queued_bytes: u64,
        /// Its limit.
        limit_bytes: u64,
    },
    /// A message is larger than a frame may be.
    #[error("{context}: a message may have {limit_bytes} bytes: send it in parts")]
    TooLarge {
        /// What was being done.
        context: Box<Context>,
        /// The limit.
        limit_bytes: u64,
    },
    /// The peer is not in the group.
    #[error("{context}: that rank is not another member of the group")]
    NotAMember {
        /// What was being done.
        context: Box<Context>,
    },
    /// A message has another size or shape than was agreed.
    #[error("{context}: found {found}, expected {expected}: the ranks do not make the same calls")]
    Mismatch {
        /// What was being done.
        context: Box<Context>,
        /// What came.
        found: String,
        /// What should have come.
        expected: String,
    },
    /// A peer sent what the protocol does not allow; its connection was closed.
    #[error("{context}: the peer sent {found}; its connection was closed")]
    Protocol {
        /// What was being done.
        context: Box<Context>,
        /// What it sent.
        found: String,
    },
    /// A transport cannot take memory of this kind.
    #[error("transport {transport} cannot take {kind:?} memory yet: copy it to host memory first")]
    Memory {
        /// The transport.
        transport: &'static str,
        /// The kind of memory.
        kind: MemoryKind,
    },
    /// [`Communicator::abort`](crate::Communicator::abort) was called here.
    #[error("{context}: aborted")]
    Aborted {
        /// What was being done.
        context: Box<Context>,
    },
    /// An earlier error broke this communicator.
    #[error("{context}: this communicator failed before and must be replaced")]
    Broken {
        /// What was being done.
        context: Box<Context>,
        /// The first error.
        #[source]
        cause: Arc<Error>,
    },
    /// The system refused something.
    #[error("{context}: the system refused to {action}")]
    System {
        /// What was being done.
        context: Box<Context>,
        /// What was asked of it.
        action: &'static str,
        /// What it said.
        #[source]
        source: Arc<io::Error>,
    },
}

impl Error {
    /// The error that came first: for a broken communicator the one that broke it.
    pub fn root(&self) -> &Self {
        match self {
            Self::Broken { cause, .. } => cause.root(),
            other => other,
        }
    }

    /// What was being done, where the error has a context.
    pub fn context(&self) -> Option<&Context> {
        match self {
            Self::Incomplete { context, .. }
            | Self::Refused { context, .. }
            | Self::WrongKey { context, .. }
            | Self::PeerDead { context, .. }
            | Self::PeerLeft { context }
            | Self::Deadline { context, .. }
            | Self::QueueFull { context, .. }
            | Self::TooLarge { context, .. }
            | Self::NotAMember { context }
            | Self::Mismatch { context, .. }
            | Self::Protocol { context, .. }
            | Self::Aborted { context }
            | Self::Broken { context, .. }
            | Self::System { context, .. } => Some(context),
            Self::Bind { .. } | Self::Options { .. } | Self::Memory { .. } => None,
        }
    }

    /// The rank whose death or misconduct is the root of this error.
    pub fn culprit(&self) -> Option<Rank> {
        match self.root() {
            Self::PeerDead { context, .. }
            | Self::PeerLeft { context }
            | Self::Protocol { context, .. }
            | Self::Mismatch { context, .. }
            | Self::Deadline { context, .. } => context.peer,
            _ => None,
        }
    }
}

fn list(ranks: &[Rank]) -> String {
    ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn seen(refused: &[String]) -> String {
    if refused.is_empty() { String::new() } else { format!(" (meanwhile: {})", refused.join("; ")) }
}
