//! `job.toml`: what to train, on what, how, and what the user wants of the plan.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::canonical::Hash;
use crate::dtype::DType;
use crate::ids::DeviceId;
use crate::{Error, Result};

/// A training job. Its hash stands in plans and manifests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// A name for people.
    pub name: String,
    /// The model.
    pub model: ModelSection,
    /// The text.
    pub data: DataSection,
    /// How it is trained.
    pub recipe: Recipe,
    /// What the user wants of the plan.
    #[serde(default)]
    pub policy: Policy,
}

/// Most samples of a step: the planner writes every micro-batch down.
const MAX_GLOBAL_BATCH: u32 = 65_536;

/// `[model]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// Path of a Hugging Face `config.json`, relative to the job's file.
    pub config: String,
    /// Compute dtype; `f32` today.
    #[serde(default = "f32_dtype")]
    pub dtype: DType,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// Text files, globs, folders and `.jsonl` files, relative to the job's file; a leading
    /// `${NAME}` stands for an environment variable.
    pub paths: Vec<String>,
    /// A `tokenizer.json`, relative to the job's file; absent: a byte-level BPE of the model's
    /// vocabulary size is trained on the text.
    #[serde(default)]
    pub tokenizer: Option<String>,
    /// Share of the tokens that is held out for evaluation.
    #[serde(default = "defaults::held_out")]
    pub held_out: f64,
    /// Bytes of text to use at most, taken evenly.
    #[serde(default)]
    pub max_bytes: Option<u64>,
}

/// `[recipe]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Seed of parameters and sample order.
    #[serde(default)]
    pub seed: u64,
    /// Optimizer updates.
    pub steps: u64,
    /// Samples a step.
    pub global_batch: u32,
    /// Tokens a sample.
    pub seq_len: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Learning rate at the end of the cosine, as a share of the peak.
    #[serde(default = "defaults::min_learning_rate_share")]
    pub min_learning_rate_share: f64,
    /// Steps of linear warm-up.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Steps over which the cosine falls; absent: `steps`.
    #[serde(default)]
    pub decay_steps: Option<u64>,
    /// Decoupled weight decay; norms and biases do not decay.
    #[serde(default = "defaults::weight_decay")]
    pub weight_decay: f64,
    /// AdamW's beta 1.
    #[serde(default = "defaults::beta1")]
    pub beta1: f64,
    /// AdamW's beta 2.
    #[serde(default = "defaults::beta2")]
    pub beta2: f64,
    /// AdamW's epsilon.
    #[serde(default = "defaults::eps")]
    pub eps: f64,
    /// Greatest global gradient norm; 0: no clipping.
    #[serde(default = "defaults::clip")]
    pub clip: f64,
    /// Evaluate every so many steps; 0: only at the end.
    #[serde(default)]
    pub evaluate_every: u64,
    /// Samples of the held-out split in one evaluation.
    #[serde(default = "defaults::evaluate_samples")]
    pub evaluate_samples: u64,
    /// Checkpoint every so many steps; 0: only at the end.
    #[serde(default)]
    pub checkpoint_every: u64,
    /// Committed checkpoints that are kept; at least 2.
    #[serde(default = "defaults::keep_checkpoints")]
    pub keep_checkpoints: u32,
}

/// `[policy]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Least number of kinds in the plan, where a kind counts only with at least half of what its
    /// own speed would give: a number, or `"all"`.
    pub min_kinds: MinKinds,
    /// The form of the plan.
    pub shape: PlanShape,
    /// Use only these devices.
    pub devices: Vec<DeviceId>,
    /// Micro-batch sizes to consider; empty: those of the profile.
    pub micro_batches: Vec<u32>,
    /// Most micro-batches of one pipeline in a step; 0: no limit.
    pub max_micro_batches: u32,
}

/// How many kinds must count in a plan: `min_kinds = 3` or `min_kinds = "all"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MinKinds {
    /// At least so many; a plan with fewer is an error.
    AtLeast(u32),
    /// As many as can count of those that are there, which may be different ones on every host.
    All,
}

impl Default for MinKinds {
    fn default() -> Self {
        Self::AtLeast(0)
    }
}

impl From<u32> for MinKinds {
    fn from(least: u32) -> Self {
        Self::AtLeast(least)
    }
}

impl MinKinds {
    /// What is asked for where `present` kinds are there.
    pub fn wanted(self, present: u32) -> u32 {
        match self {
            Self::AtLeast(least) => least,
            Self::All => present,
        }
    }
}

impl Serialize for MinKinds {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::AtLeast(least) => serializer.serialize_u32(*least),
            Self::All => serializer.serialize_str("all"),
        }
    }
}

impl<'de> Deserialize<'de> for MinKinds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(MinKindsVisitor)
    }
}

struct MinKindsVisitor;

impl de::Visitor<'_> for MinKindsVisitor {
    type Value = MinKinds;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`policy.min_kinds` to be a number or \"all\"")
    }

    fn visit_u64<E: de::Error>(self, found: u64) -> std::result::Result<MinKinds, E> {
        let invalid = |_| E::invalid_value(de::Unexpected::Unsigned(found), &self);
        u32::try_from(found).map(MinKinds::AtLeast).map_err(invalid)
    }

    fn visit_i64<E: de::Error>(self, found: i64) -> std::result::Result<MinKinds, E> {
        let invalid = |_| E::invalid_value(de::Unexpected::Signed(found), &self);
        u32::try_from(found).map(MinKinds::AtLeast).map_err(invalid)
    }

    fn visit_str<E: de::Error>(self, found: &str) -> std::result::Result<MinKinds, E> {
        match found {
            "all" => Ok(MinKinds::All),
            _ => Err(E::invalid_value(de::Unexpected::Str(found), &self)),
        }
    }
}

/// Which plans may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlanShape {
    /// The fastest under the profile.
    #[default]
    Any,
    /// Every pipeline one stage.
    DataParallel,
    /// One pipeline over all devices.
    Pipeline,
}

impl JobSpec {
    /// Parses and validates a `job.toml`; `file` is only named in errors.
    pub fn from_toml(file: &str, text: &str) -> Result<Self> {
        let job: Self = crate::suggest::parse_toml(file, text)?;
        job.validate(file)?;
        Ok(job)
    }

    /// Hash of the whole job.
    pub fn hash(&self) -> Hash {
        Hash::of(self)
    }

    /// Checks what types alone cannot.
    pub fn validate(&self, file: &str) -> Result<()> {
        let check = |ok: bool, key: &str, found: String, allowed: &str| {
            if ok {
                Ok(())
            } else {
                Err(Error::Value { file: file.into(), key: key.into(), found, allowed: allowed.into() })
            }
        };
        let recipe = &self.recipe;
        self.model.dtype.require_compute_supported()?;
        check(!self.data.paths.is_empty(), "data.paths", "empty".into(), "at least one path")?;
        check(
            (0.0..0.5).contains(&self.data.held_out),
            "data.held_out",
            self.data.held_out.to_string(),
            "from 0 to 0.5",
        )?;
        check(recipe.steps > 0, "recipe.steps", "0".into(), "at least 1")?;
        check(
            (1..=MAX_GLOBAL_BATCH).contains(&recipe.global_batch),
            "recipe.global_batch",
            recipe.global_batch.to_string(),
            &format!("from 1 to {MAX_GLOBAL_BATCH}"),
        )?;
        check(recipe.seq_len > 0, "recipe.seq_len", "0".into(), "at least 1")?;
        for (key, value, allowed, ok) in [
            ("recipe.learning_rate", recipe.learning_rate, "positive", recipe.learning_rate > 0.0),
            (
                "recipe.min_learning_rate_share",
                recipe.min_learning_rate_share,
                "from 0 to 1",
                (0.0..=1.0).contains(&recipe.min_learning_rate_share),
            ),
            ("recipe.weight_decay", recipe.weight_decay, "0 or more", recipe.weight_decay >= 0.0),
            ("recipe.beta1", recipe.beta1, "from 0 to below 1", (0.0..1.0).contains(&recipe.beta1)),
            ("recipe.beta2", recipe.beta2, "from 0 to below 1", (0.0..1.0).contains(&recipe.beta2)),
            ("recipe.eps", recipe.eps, "positive", recipe.eps > 0.0),
            ("recipe.clip", recipe.clip, "0 or more", recipe.clip >= 0.0),
        ] {
            check(ok && value.is_finite(), key, value.to_string(), allowed)?;
        }
        check(
            recipe.keep_checkpoints >= 2,
            "recipe.keep_checkpoints",
            recipe.keep_checkpoints.to_string(),
            "at least 2",
        )
    }
}

impl Recipe {
    /// Learning rate of `step` (from 0): linear warm-up, then a cosine to the minimum.
    pub fn learning_rate_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let decay = self.decay_steps.unwrap_or(self.steps).saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / decay as f64).min(1.0);
        let share = self.min_learning_rate_share
            + (1.0 - self.min_learning_rate_share) * 0.5 * (1.0 + cosine_of_half_turns(progress));
        self.learning_rate * share
    }
}

/// cos(πx) for 0 ≤ x ≤ 1, from additions and multiplications alone: the platform's cosine may differ
/// in its last bit from host to host, and every host must update with the same rate.
///
/// Taylor's series about the nearest zero or extremum, at most π/4 away; the first term left out is
/// below 1e-17.
fn cosine_of_half_turns(x: f64) -> f64 {
    let series = |first: f64, from: u32, z: f64| {
        let (mut term, mut sum, mut n) = (first, first, from);
        while n < 18 {
            term *= -z * z / f64::from((n + 1) * (n + 2));
            sum += term;
            n += 2;
        }
        sum
    };
    let angle = |half_turns: f64| std::f64::consts::PI * half_turns;
    if x <= 0.25 {
        series(1.0, 0, angle(x))
    } else if x < 0.75 {
        let z = angle(0.5 - x);
        series(z, 1, z)
    } else {
        -series(1.0, 0, angle(1.0 - x))
    }
}

fn f32_dtype() -> DType {
    DType::F32
}

mod defaults {
    pub(super) fn held_out() -> f64 {
        0.02
    }
    pub(super) fn min_learning_rate_share() -> f64 {
        0.1
    }
    pub(super) fn weight_decay() -> f64 {
        0.1
    }
    pub(super) fn beta1() -> f64 {
        0.9
    }
    pub(super) fn beta2() -> f64 {
        0.95
    }
    pub(super) fn eps() -> f64 {
        1e-8
    }
    pub(super) fn clip() -> f64 {
        1.0
    }
    pub(super) fn evaluate_samples() -> u64 {
        256
    }
    pub(super) fn keep_checkpoints() -> u32 {
        2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "name = 'x'\n[model]\nconfig = 'config.json'\n[data]\npaths = ['a']\n[recipe]\nsteps = 100\nglobal_batch = 8\nseq_len = 16\nlearning_rate = 0.01\nwarmup_steps = 10\n";

    #[test]
    fn learning_rate_warms_up_and_falls_to_its_minimum() {
        let recipe = JobSpec::from_toml("job.toml", JOB).unwrap().recipe;
        assert!((recipe.learning_rate_at(0) - 0.001).abs() < 1e-12);
        assert!((recipe.learning_rate_at(9) - 0.01).abs() < 1e-12);
        assert!((recipe.learning_rate_at(100) - 0.001).abs() < 1e-12);
        assert!((10..99).all(|s| recipe.learning_rate_at(s) > recipe.learning_rate_at(s + 1)));
    }

    #[test]
    fn the_cosine_is_the_same_on_every_host_and_is_one() {
        for i in 0..=1000 {
            let x = f64::from(i) / 1000.0;
            let (found, wanted) = (cosine_of_half_turns(x), (std::f64::consts::PI * x).cos());
            assert!((found - wanted).abs() < 1e-15, "{x}: {found} against {wanted}");
        }
        let ends = [0.0, 0.5, 1.0].map(|x| cosine_of_half_turns(x).to_bits());
        assert_eq!(ends, [1.0f64, 0.0, -1.0].map(f64::to_bits));
        // Bits that any host must give.
        let bits = [0.1, 0.3, 0.6, 0.9].map(|x| cosine_of_half_turns(x).to_bits());
        assert_eq!(
            bits,
            [0x3fee_6f0e_1344_54ff, 0x3fe2_cf23_0475_5a5e, 0xbfd3_c6ef_372f_e94f, 0xbfee_6f0e_1344_54ff]
        );
    }

    #[test]
    fn kinds_are_asked_for_by_number_or_all_of_them() {
        let job =
            |value: &str| JobSpec::from_toml("job.toml", &format!("{JOB}[policy]\nmin_kinds = {value}\n"));
        for (value, wanted) in [("3", 3), ("\"all\"", 4)] {
            let job = job(value).unwrap();
            assert_eq!(job.policy.min_kinds.wanted(4), wanted);
            let again: JobSpec = serde_json::from_str(&serde_json::to_string(&job).unwrap()).unwrap();
            assert_eq!(again, job);
        }
        assert_eq!(JobSpec::from_toml("job.toml", JOB).unwrap().policy.min_kinds.wanted(4), 0);
        for value in ["\"al\"", "-1", "0.5"] {
            let error = job(value).unwrap_err().to_string();
            assert!(error.contains("expected `policy.min_kinds` to be a number or \"all\""), "{error}");
        }
    }

    #[test]
    fn bad_values_name_key_and_what_is_allowed() {
        let error = JobSpec::from_toml("job.toml", &JOB.replace("seq_len = 16", "seq_len = 0")).unwrap_err();
        assert_eq!(error.to_string(), "job.toml: `recipe.seq_len` is 0, but must be at least 1");
        for batch in ["0", "65537", "4294967295"] {
            let job = JOB.replace("global_batch = 8", &format!("global_batch = {batch}"));
            let error = JobSpec::from_toml("job.toml", &job).unwrap_err().to_string();
            let wanted = format!("job.toml: `recipe.global_batch` is {batch}, but must be from 1 to 65536");
            assert_eq!(error, wanted);
        }
        let error =
            JobSpec::from_toml("job.toml", &JOB.replace("config =", "dtype = 'bf16'\nconfig =")).unwrap_err();
        assert_eq!(error.to_string(), "compute dtype bf16 is not supported yet: use f32");
    }
}
