//! A checkpoint's table of contents. A manifest that is there means that every shard it names was
//! written and verified.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::canonical::Hash;
use crate::dtype::DType;
use crate::ids::{Generation, RunId};
use crate::model::{ModelSpec, TensorSpec};
use crate::slice::{Role, Slice};
use crate::{Error, Result};

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

/// What comes with the last piece of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEnd {
    /// What is in it, in order.
    pub entries: Vec<ShardEntry>,
    /// SHA-256 of its bytes, taken by the owner while it gave them out.
    pub sha256: Hash,
}

impl Manifest {
    /// The current form.
    pub const FORMAT: u32 = 1;
    /// Its file name.
    pub const FILE: &'static str = "manifest.json";

    /// Parses a `manifest.json` and checks it; `file` is only named in errors.
    pub fn from_json(file: &str, text: &str) -> Result<Self> {
        let manifest: Self = crate::canonical::decode(file, text)?;
        manifest.validate(file)?;
        Ok(manifest)
    }

    /// The roles that it holds.
    pub fn roles(&self) -> BTreeSet<Role> {
        self.shards.iter().flat_map(|shard| shard.entries.iter().map(|entry| entry.role)).collect()
    }

    /// Checks that every entry is a row range of a tensor of the model, that no two of one role
    /// overlap, and that each role that is there is there whole; parameters always are. Whatever
    /// the document says, the work is bounded by its length. `file` is only named in errors.
    pub fn validate(&self, file: &str) -> Result<()> {
        if self.format != Self::FORMAT {
            return Err(bad(file, "format", self.format, Self::FORMAT));
        }
        let tensors = self.tensors(file)?;
        let mut files = BTreeSet::new();
        let mut rows: BTreeMap<(Role, &str), Vec<Range<u64>>> = BTreeMap::new();
        for (index, shard) in self.shards.iter().enumerate() {
            if !is_shard_name(&shard.file) || !files.insert(&shard.file) {
                let allowed = "a name of its own, as `shard-r0.safetensors`";
                return Err(bad(file, format!("shards[{index}].file"), format!("{:?}", shard.file), allowed));
            }
            validate_entries(file, index, shard, &tensors)?;
            for entry in &shard.entries {
                rows.entry((entry.role, &entry.slice.tensor)).or_default().push(entry.slice.rows());
            }
        }
        for role in self.roles().into_iter().chain([Role::Parameter]) {
            for tensor in tensors.values() {
                let ranges = rows.get(&(role, tensor.name.as_str())).cloned().unwrap_or_default();
                if let Some(row) = first_row_not_once(ranges, tensor.rows()) {
                    let found =
                        format!("without row {row} of {} {}, or has it twice", role.name(), tensor.name);
                    return Err(bad(file, "shards", found, "every row of every tensor once"));
                }
            }
        }
        Ok(())
    }

    /// The model's tensors by name. A model of more layers than there are entries is refused
    /// before its tensors are listed.
    fn tensors(&self, file: &str) -> Result<BTreeMap<String, TensorSpec>> {
        let model = &self.model;
        let entries: usize = self.shards.iter().map(|shard| shard.entries.len()).sum();
        if model.num_layers as usize > entries {
            let allowed = format!("at most the {entries} entries of the shards");
            return Err(bad(file, "model.num_layers", model.num_layers, allowed));
        }
        let sizes = [
            ("model.vocab_size", model.vocab_size),
            ("model.hidden_size", model.hidden_size),
            ("model.intermediate_size", model.intermediate_size),
            ("model.num_heads", model.num_heads),
            ("model.num_kv_heads", model.num_kv_heads),
            ("model.head_dim", model.head_dim),
        ];
        for (key, size) in sizes {
            if !(1..=1 << 24).contains(&size) {
                return Err(bad(file, key, size, "a whole number from 1 to 16777216"));
            }
        }
        if model.num_heads.max(model.num_kv_heads).checked_mul(model.head_dim).is_none() {
            return Err(bad(
                file,
                "model.head_dim",
                model.head_dim,
                "small enough for all heads to fit 32 bits",
            ));
        }
        Ok((0..model.num_placeable_layers())
            .flat_map(|layer| model.layer_tensors(layer))
            .map(|tensor| (tensor.name.clone(), tensor))
            .collect())
    }
}

fn validate_entries(
    file: &str,
    index: usize,
    shard: &Shard,
    tensors: &BTreeMap<String, TensorSpec>,
) -> Result<()> {
    let mut keys = BTreeSet::new();
    let mut size_bytes = 0u64;
    for entry in &shard.entries {
        let slice = &entry.slice;
        let place = |what: &str| format!("shards[{index}] {:?} {what}", entry.key);
        if !keys.insert(&entry.key) {
            return Err(bad(file, place("key"), "there twice", "unique in its file"));
        }
        let Some(tensor) = tensors.get(&slice.tensor) else {
            return Err(bad(file, place("tensor"), format!("{:?}", slice.tensor), "a tensor of the model"));
        };
        let dims = tensor.shape.len();
        let fits = slice.begin.len() == dims
            && slice.end.len() == dims
            && slice.begin[0] < slice.end[0]
            && slice.end[0] <= tensor.rows()
            && slice.element_range(tensor).is_some();
        if !fits {
            let allowed = format!("a row range of {:?}", tensor.shape);
            return Err(bad(file, place("slice"), format!("{:?}..{:?}", slice.begin, slice.end), allowed));
        }
        // Dimensions are at most 2^32 each and there are two at most, so the product fits.
        let of_entry = slice.num_elements().checked_mul(entry.dtype.size_bytes());
        size_bytes = of_entry.and_then(|of_entry| size_bytes.checked_add(of_entry)).unwrap_or(u64::MAX);
    }
    if size_bytes > shard.size_bytes {
        let allowed = format!("at least the {size_bytes} bytes of its entries");
        return Err(bad(file, format!("shards[{index}].size_bytes"), shard.size_bytes, allowed));
    }
    Ok(())
}

/// A plain name: nothing that could leave the checkpoint's folder or hide in it.
fn is_shard_name(name: &str) -> bool {
    name.ends_with(".safetensors")
        && name.len() <= 128
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// The first of `0..rows` that is in none of the ranges or in two.
fn first_row_not_once(mut ranges: Vec<Range<u64>>, rows: u64) -> Option<u64> {
    ranges.sort_by_key(|range| range.start);
    let mut next = 0;
    for range in ranges {
        if range.start != next {
            return Some(next.min(range.start));
        }
        next = range.end;
    }
    (next != rows).then_some(next)
}

fn bad(file: &str, key: impl Into<String>, found: impl Display, allowed: impl Display) -> Error {
    Error::Value {
        file: file.into(),
        key: key.into(),
        found: found.to_string(),
        allowed: allowed.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let model = ModelSpec {
            vocab_size: 8,
            hidden_size: 4,
            intermediate_size: 6,
            num_layers: 1,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 2,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: crate::model::RopeScaling::Default,
            tie_embeddings: true,
            max_position: 16,
            initializer_range: 0.02,
        };
        let entries: Vec<ShardEntry> = model
            .tensors()
            .iter()
            .map(|tensor| ShardEntry {
                key: tensor.name.clone(),
                slice: Slice::whole(tensor),
                role: Role::Parameter,
                dtype: DType::F32,
            })
            .collect();
        Manifest {
            format: Manifest::FORMAT,
            run: RunId::new("r").unwrap(),
            generation: Generation::default(),
            step: 3,
            num_updates: 3,
            job: Hash::of_bytes(b"job"),
            plan: Hash::of_bytes(b"plan"),
            model,
            tokenizer: None,
            shards: vec![Shard {
                file: "shard-r0.safetensors".into(),
                sha256: Hash::of_bytes(b""),
                size_bytes: 10_000,
                entries,
            }],
        }
    }

    /// What `change` makes of a good manifest, as its reader says it.
    fn refusal(change: impl Fn(&mut Manifest)) -> String {
        let mut manifest = manifest();
        change(&mut manifest);
        Manifest::from_json("m.json", &crate::canonical::encode(&manifest)).unwrap_err().to_string()
    }

    #[test]
    fn what_was_written_reads_back() {
        let text = crate::canonical::encode(&manifest());
        assert_eq!(Manifest::from_json("m.json", &text).unwrap(), manifest());
    }

    #[test]
    fn each_kind_of_damage_is_named() {
        let entry = |m: &mut Manifest, change: fn(&mut ShardEntry)| change(&mut m.shards[0].entries[0]);
        for (change, said) in [
            (refusal(|m| m.format = 9), "`format` is 9"),
            (refusal(|m| m.shards[0].file = "../x.safetensors".into()), "a name of its own"),
            (refusal(|m| m.shards.push(m.shards[0].clone())), "a name of its own"),
            (refusal(|m| m.model.num_layers = u32::MAX), "at most the 11 entries"),
            (refusal(|m| m.model.head_dim = 1 << 24), "a row range of"),
            (refusal(|m| m.model.hidden_size = 0), "`model.hidden_size` is 0"),
            (refusal(|m| m.shards[0].size_bytes = 7), "bytes of its entries"),
            (refusal(|m| drop(m.shards[0].entries.remove(0))), "without row 0"),
            (refusal(|m| entry(m, |e| e.slice.end[0] = 7)), "without row 7"),
            (refusal(|m| entry(m, |e| e.slice.end[0] = u64::MAX)), "a row range of [8, 4]"),
            (refusal(|m| entry(m, |e| e.slice.begin.clear())), "a row range of"),
            (refusal(|m| entry(m, |e| e.slice.end[1] = 3)), "a row range of"),
            (refusal(|m| entry(m, |e| e.slice.tensor = "x".into())), "a tensor of the model"),
            (refusal(|m| entry(m, |e| e.role = Role::M)), "every row of every tensor once"),
        ] {
            assert!(change.contains(said), "{change}");
        }
    }
}
