//! Names of places, processes and moments.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Index of a worker, dense in `0..world_size`, valid only within one [`Generation`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rank(pub u32);

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}", self.0)
    }
}

impl Rank {
    /// The rank as an index into per-rank tables.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One pair of membership and plan. Ordered; stands in every message, collective and checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Generation {
    /// Raised when another coordinator takes over.
    pub epoch: u64,
    /// Raised for each new membership or plan within an epoch.
    pub sequence: u64,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {}.{}", self.epoch, self.sequence)
    }
}

impl Generation {
    /// The generation after this one, under the same leader.
    #[must_use]
    pub fn next(self) -> Self {
        Self { epoch: self.epoch, sequence: self.sequence + 1 }
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $allowed:literal, $extra:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and wraps a name.
            pub fn new(name: impl Into<String>) -> Result<Self> {
                let name = name.into();
                let extra: &[char] = &$extra;
                let ok = !name.is_empty()
                    && name.len() <= 128
                    && !name.starts_with('.')
                    && name.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(&c));
                if ok {
                    Ok(Self(name))
                } else {
                    Err(Error::Name { what: $what, found: name, allowed: $allowed })
                }
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(name: String) -> Result<Self> {
                Self::new(name)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(name: &str) -> Result<Self> {
                Self::new(name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// One training job from first launch to report, over all its generations; also the name of
    /// its folder.
    RunId, "run id", "letters, digits, '-', '_' and '.', not starting with '.'", ['-', '_', '.']
);
name_type!(
    /// One machine: one OS instance with one agent.
    NodeId, "node name", "letters, digits, '-', '_' and '.'", ['-', '_', '.']
);
name_type!(
    /// One environment of an agent's local table.
    EnvironmentId, "environment name", "letters, digits, '-', '_' and '.'", ['-', '_', '.']
);
name_type!(
    /// One device, stable over a run: `NODE/ENVIRONMENT:INDEX`, for example `local/torch:0`.
    DeviceId, "device id", "NODE/ENVIRONMENT:INDEX", ['-', '_', '.', '/', ':']
);
name_type!(
    /// What makes two devices interchangeable: hardware and the stack that drives it, for example
    /// `amd-epyc/torch-cpu`.
    Kind, "kind", "letters, digits, '-', '_', '.', '/' and '+'", ['-', '_', '.', '/', '+']
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_order_by_epoch_then_sequence() {
        let old = Generation { epoch: 1, sequence: 9 };
        assert!(old < old.next());
        assert!(old.next() < Generation { epoch: 2, sequence: 0 });
    }

    #[test]
    fn names_that_could_leave_a_folder_are_refused() {
        for bad in ["", "..", ".hidden", "a/b", "a b", "ü"] {
            assert!(RunId::new(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(RunId::new("2026-01-02_quickstart.1").is_ok());
    }
}
