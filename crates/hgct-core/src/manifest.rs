//! A checkpoint's table of contents. A manifest that is there means that every shard it names was
//! written and verified.

use serde::{Deserialize, Serialize};

use crate::canonical::Hash;
use crate::dtype::DType;
use crate::ids::{Generation, RunId};
use crate::model::ModelSpec;
use crate::slice::{Role, Slice};

/// `manifest.json` of one committed step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this document's form.
    pub format: u32,
    /// The run that wrote it.
    pub run: RunId,
    /// Under which membership and plan.
    pub generation: Generation,
    /// Updates that are in it: the next step to train, from 0.
    pub step: u64,
    /// Updates of AdamW that were not skipped; its bias correction counts these.
    pub num_updates: u64,
    /// Hash of the job that was trained.
    pub job: Hash,
    /// Hash of the plan that wrote it.
    pub plan: Hash,
    /// The model.
    pub model: ModelSpec,
    /// Hash of the tokenizer's file.
    pub tokenizer: Option<Hash>,
    /// The files.
    pub shards: Vec<Shard>,
}

/// One safetensors file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// File name inside of the checkpoint's folder.
    pub file: String,
    /// SHA-256 of its bytes.
    pub sha256: Hash,
    /// Its length.
    pub size_bytes: u64,
    /// What is in it.
    pub entries: Vec<ShardEntry>,
}

/// One slice in a shard.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Key of the tensor inside of the safetensors file.
    pub key: String,
    /// Which part of which tensor.
    pub slice: Slice,
    /// What it means.
    pub role: Role,
    /// Its element type.
    pub dtype: DType,
}

impl Manifest {
    /// The current form.
    pub const FORMAT: u32 = 1;
    /// Its file name.
    pub const FILE: &'static str = "manifest.json";
}
