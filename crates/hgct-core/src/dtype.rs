//! Element types and kinds of memory.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision: the one dtype that engines compute in today.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit float, 4 exponent bits.
    F8E4m3,
    /// IEEE double precision (the reference model).
    F64,
    /// Token ids and labels.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub fn size_bytes(self) -> u64 {
        match self {
            Self::F64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4m3 => 1,
        }
    }

    /// The name used in documents, at the engine interface and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F8E4m3 => "f8e4m3",
            Self::F64 => "f64",
            Self::I32 => "i32",
        }
    }

    /// Refuses every compute dtype that no engine has yet.
    pub fn require_compute_supported(self) -> Result<Self> {
        match self {
            Self::F32 => Ok(self),
            other => Err(Error::NotYet { what: "compute dtype", value: other.name().into(), instead: "f32" }),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where the bytes of a lease or a transport region lie.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum MemoryKind {
    /// Ordinary host memory.
    Host,
    /// Page-locked host memory.
    Pinned,
    /// Memory of a device of the named vendor.
    Device(String),
}
