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
    /// A token file cannot be read.
    #[error("the training data cannot be read")]
    Data(#[from] hgct_data::Error),
    /// A message of the agent's pipe is malformed or too large.
    #[error("the agent's pipe is broken")]
    Control(#[from] hgct_control::Error),
    /// A checkpoint shard cannot be made.
    #[error("the checkpoint cannot be written")]
    Checkpoint(#[from] hgct_checkpoint::Error),
    /// An order does not fit what the worker is doing.
    #[error("order refused: {message}")]
    Orders {
        /// What does not fit.
        message: String,
    },
}

/// What a panic says.
pub fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}

/// An error with all its causes, for a log or a report.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
