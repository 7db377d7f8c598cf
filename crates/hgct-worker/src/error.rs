//! The one error type of this crate.

use hgct_core::dtype::DType;
use hgct_core::ids::Rank;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in a worker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The framework failed.
    #[error("engine {engine}: {operation} failed: {message}")]
    Engine {
        /// The engine.
        engine: String,
        /// The call.
        operation: &'static str,
        /// What the framework said.
        message: String,
    },
    /// A lease does not hold what is needed.
    #[error("tensor {name} is {found} or misaligned, expected {expected}")]
    Lease {
        /// Tensor name.
        name: String,
        /// What it is.
        found: DType,
        /// What it must be.
        expected: DType,
    },
    /// An engine answered with something else than asked for.
    #[error("engine {engine}: {operation} answered without `{missing}`")]
    Answer {
        /// The engine.
        engine: String,
        /// The call.
        operation: &'static str,
        /// What is missing.
        missing: &'static str,
    },
    /// The plan or schedule cannot be executed here.
    #[error("the plan cannot be executed")]
    Plan(#[from] hgct_core::Error),
    /// A transfer or collective failed.
    #[error("communication failed")]
    Comm(#[from] hgct_comm::Error),
    /// A local file failed.
    #[error("{operation} of {path} failed")]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The coordinator or agent sent what does not fit the worker's state.
    #[error("{rank}: {message}")]
    Protocol {
        /// This worker.
        rank: Rank,
        /// What does not fit.
        message: String,
    },
}
