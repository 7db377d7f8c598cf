//! What is in a checkpoint, for people and for programs.

use std::collections::BTreeMap;
use std::fmt;

use hgct_core::canonical::Hash;
use hgct_core::ids::{Generation, RunId};
use hgct_core::manifest::ShardEntry;
use hgct_core::slice::Role;
use serde::Serialize;

use crate::Checkpoint;

/// A verified checkpoint in short; `Display` is a table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Its folder.
    pub path: String,
    /// The run that wrote it.
    pub run: RunId,
    /// Membership and plan that wrote it.
    pub generation: Generation,
    /// Steps in it.
    pub step: u64,
    /// Updates in it; steps less those that were skipped.
    pub num_updates: u64,
    /// Parameters of the model.
    pub num_parameters: u64,
    /// Hash of the job.
    pub job: Hash,
    /// Hash of the plan.
    pub plan: Hash,
    /// Hash of the tokenizer.
    pub tokenizer: Option<Hash>,
    /// All shards together.
    pub size_bytes: u64,
    /// What there is of the model.
    pub roles: Vec<RoleSummary>,
    /// The files.
    #[serde(rename = "rows")]
    pub shards: Vec<ShardSummary>,
}

/// All slices of one role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RoleSummary {
    /// The role.
    pub role: Role,
    /// Distinct tensors.
    pub num_tensors: u64,
    /// Slices that they are cut into.
    pub num_slices: u64,
    /// Bytes of their elements.
    pub size_bytes: u64,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShardSummary {
    /// File name.
    pub file: String,
    /// Its length.
    pub size_bytes: u64,
    /// Slices in it.
    pub num_slices: u64,
    /// Its hash.
    pub sha256: Hash,
}

impl Checkpoint {
    /// What is in it.
    pub fn summary(&self) -> Summary {
        let manifest = self.manifest();
        let mut roles: BTreeMap<Role, Vec<&ShardEntry>> = BTreeMap::new();
        for entry in manifest.shards.iter().flat_map(|shard| &shard.entries) {
            roles.entry(entry.role).or_default().push(entry);
        }
        Summary {
            path: self.path().display().to_string(),
            run: manifest.run.clone(),
            generation: manifest.generation,
            step: manifest.step,
            num_updates: manifest.num_updates,
            num_parameters: manifest.model.num_parameters(),
            job: manifest.job.clone(),
            plan: manifest.plan.clone(),
            tokenizer: manifest.tokenizer.clone(),
            size_bytes: manifest.shards.iter().map(|shard| shard.size_bytes).sum(),
            roles: roles.into_iter().map(|(role, entries)| RoleSummary::of(role, &entries)).collect(),
            shards: manifest
                .shards
                .iter()
                .map(|shard| ShardSummary {
                    file: shard.file.clone(),
                    size_bytes: shard.size_bytes,
                    num_slices: shard.entries.len() as u64,
                    sha256: shard.sha256.clone(),
                })
                .collect(),
        }
    }
}

impl RoleSummary {
    fn of(role: Role, entries: &[&ShardEntry]) -> Self {
        let tensors: std::collections::BTreeSet<&str> =
            entries.iter().map(|entry| entry.slice.tensor.as_str()).collect();
        Self {
            role,
            num_tensors: tensors.len() as u64,
            num_slices: entries.len() as u64,
            size_bytes: entries.iter().map(|entry| entry.slice.size_bytes(entry.dtype)).sum(),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} (verified)", self.path)?;
        writeln!(f, "  run         {} ({})", self.run, self.generation)?;
        writeln!(f, "  step        {} ({} updates)", self.step, self.num_updates)?;
        writeln!(f, "  parameters  {}", self.num_parameters)?;
        let tokenizer = self.tokenizer.as_ref().map_or("none", Hash::short);
        let (job, plan) = (self.job.short(), self.plan.short());
        writeln!(f, "  hashes      job {job}, plan {plan}, tokenizer {tokenizer}")?;
        writeln!(f, "\n  {:<28} {:>8} {:>8} {:>16}", "role", "tensors", "slices", "bytes")?;
        for r in &self.roles {
            writeln!(
                f,
                "  {:<28} {:>8} {:>8} {:>16}",
                r.role.name(),
                r.num_tensors,
                r.num_slices,
                r.size_bytes
            )?;
        }
        writeln!(f, "\n  {:<28} {:>8} {:>8} {:>16}", "shard", "", "slices", "bytes")?;
        for s in &self.shards {
            let sha = s.sha256.short();
            writeln!(
                f,
                "  {:<28} {:>8} {:>8} {:>16}  sha256 {sha}…",
                s.file, "", s.num_slices, s.size_bytes
            )?;
        }
        writeln!(f, "  {:<28} {:>8} {:>8} {:>16}", "all", "", "", self.size_bytes)
    }
}
