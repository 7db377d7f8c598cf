//! How much of a shared host each device gets, and how a worker is held to it.
//!
//! [`assign()`] writes grants into the cluster document by policy, before anything is measured;
//! [`Holder`] keeps a worker's threads to one by control groups, [`pin`] to its cores.

mod assign;
mod cgroup;
mod holder;

pub(crate) use assign::{Policy, assign};
pub(crate) use holder::{Held, Holder, core_set, isolation, join_groups_of_agents, pin};

/// Result of this module.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a worker cannot be held to its grant. The run goes on unisolated and says so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    /// No hierarchy of control groups here has the `cpu` controller.
    #[error("no control group here has the `cpu` controller: {found}")]
    NoController {
        /// What was looked at.
        found: String,
    },
    /// The system refuses.
    #[error("{operation} {path} is not allowed here: run as root, or have the group delegated")]
    NotAllowed {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It fails in another way.
    #[error("{operation} {path} failed")]
    Failed {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    fn io(operation: &'static str, path: &std::path::Path, source: std::io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                Self::NotAllowed { operation, path, source }
            }
            _ => Self::Failed { operation, path, source },
        }
    }
}
