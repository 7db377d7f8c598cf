//! A run that goes on: its newest checkpoint that verifies, and who gets which part of it.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use hgct_checkpoint::{Checkpoint, Checkpoints};
use hgct_control::coordinator::Command;
use hgct_core::canonical::{self, Hash};
use hgct_core::ids::RunId;
use hgct_core::plan::Plan;
use hgct_core::slice::{Role, Slice};

use super::text::Text;
use crate::ckpt::newest_verified;
use crate::job::LoadedJob;
use crate::session::Session;
use crate::workspace::write_atomically;

/// A run to continue.
pub(super) struct Resume {
    pub(super) run: RunId,
    pub(super) checkpoint: Checkpoint,
}

/// A run that cannot be used as asked.
#[derive(Debug, thiserror::Error)]
#[error("run {run} {reason}")]
pub(super) struct BadRun {
    pub(super) run: RunId,
    pub(super) reason: String,
}

impl Resume {
    /// The newest checkpoint in the folder of a run that verifies; says which newer ones do not.
    /// [`BadRun`] where the job has no step left to train, before `until` or at all.
    pub(super) fn find(folder: &Path, run: &RunId, loaded: &LoadedJob, until: Option<u64>) -> Result<Self> {
        let bad = |reason| BadRun { run: run.clone(), reason };
        let checkpoints = Checkpoints::open(folder.join("checkpoints"));
        let Some(checkpoint) = newest_verified(&checkpoints)? else {
            bail!(bad("has no checkpoint that verifies".into()));
        };
        if checkpoint.manifest().model != loaded.model {
            bail!(bad(format!("trained another model than that of {}", loaded.path.display())));
        }
        let (step, steps) = (checkpoint.manifest().step, loaded.job.recipe.steps);
        if let Some(reason) = nothing_left(step, steps, until) {
            bail!(bad(reason));
        }
        if checkpoint.manifest().job != loaded.job.hash() {
            eprintln!("hgct: {} has changed since the checkpoint was written", loaded.path.display());
        }
        eprintln!("resuming {run} after step {step}");
        Ok(Self { run: run.clone(), checkpoint })
    }

    /// Waits for the text; [`BadRun`] where its tokens mean other words than those that the
    /// checkpoint's embeddings were trained on.
    pub(super) fn check_text(&self, text: Text) -> Result<Text> {
        let (data, seconds) = text.wait()?;
        let found = &data.prepared.meta.tokenizer.sha256;
        if let Some(reason) = other_tokenizer(self.checkpoint.manifest().tokenizer.as_ref(), found) {
            bail!(BadRun { run: self.run.clone(), reason });
        }
        Ok(Text::Here(Box::new((data, seconds))))
    }

    pub(super) fn step(&self) -> u64 {
        self.checkpoint.manifest().step
    }

    /// Sends every owner its state, whoever had it before.
    pub(super) fn send(&self, session: &mut Session, plan: &Plan) -> Result<()> {
        for group in &plan.owners {
            let wanted: Vec<(Slice, Role)> = group
                .slices
                .iter()
                .flat_map(|slice| [Role::Parameter, Role::M, Role::V].map(|role| (slice.clone(), role)))
                .collect();
            for piece in self.checkpoint.read_slices(&wanted)? {
                let piece = piece?;
                session.shell.command(Command::State {
                    rank: group.owner,
                    slice: piece.slice,
                    role: piece.role,
                    bytes: piece.bytes,
                })?;
            }
        }
        Ok(())
    }
}

/// Writes a run's plan. What an earlier plan of the run left must not be told as this one's.
pub(super) fn write_plan(folder: &Path, plan: &Plan) -> Result<()> {
    let path = folder.join("plan.json");
    let text = canonical::encode(plan);
    if fs::read_to_string(&path).is_ok_and(|kept| kept != text) {
        for name in ["timeline.json", "predicted_timeline.json", "explanation.json"] {
            match fs::remove_file(folder.join(name)) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {name} of the earlier plan"));
                }
                _ => {}
            }
        }
    }
    write_atomically(&path, text.as_bytes(), 0o644)
}

/// Why a run after `step` has nothing to train, if it has not.
fn nothing_left(step: u64, steps: u64, until: Option<u64>) -> Option<String> {
    let end = until.unwrap_or(steps).min(steps);
    let limit = if end == steps { "recipe.steps" } else { "--until" };
    (end <= step)
        .then(|| format!("has trained {step} steps already, and {limit} is {end}: raise it to go on"))
}

/// Why a text with this tokenizer cannot continue what was `trained`, if it cannot.
fn other_tokenizer(trained: Option<&Hash>, found: &Hash) -> Option<String> {
    let trained = trained.filter(|trained| *trained != found)?;
    Some(format!(
        "was trained with tokenizer {}, and that of this text is {}: resume it with the text that it began \
         with, by --data where that was given then",
        trained.short(),
        found.short()
    ))
}

#[cfg(test)]
mod tests {
    use hgct_core::cluster::Grant;
    use hgct_core::ids::{DeviceId, Kind, NodeId, Rank};
    use hgct_core::model::ModelSpec;
    use hgct_core::plan::{PlanBuilder, PlanRank};

    use super::*;

    #[test]
    fn a_plan_stands_alone() {
        let model = r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2}"#;
        let plan = |samples| {
            let device = PlanRank {
                device: DeviceId::new("local/torch:0").unwrap(),
                kind: Kind::new("cpu/torch").unwrap(),
                node: NodeId::new("local").unwrap(),
                grant: Grant { cpu_millicores: 500, cores: vec![], threads: 1, memory_bytes: 1 << 30 },
            };
            let builder = PlanBuilder::new(ModelSpec::from_config_json("c", model).unwrap(), 16, samples);
            builder.rank(device).pipeline(1, samples, &[(Rank(0), 4)]).build().unwrap()
        };
        let folder = tempfile::tempdir().unwrap();
        write_plan(folder.path(), &plan(2)).unwrap();
        let timeline = folder.path().join("timeline.json");
        fs::write(&timeline, "{}").unwrap();
        write_plan(folder.path(), &plan(2)).unwrap();
        assert!(timeline.exists());
        write_plan(folder.path(), &plan(3)).unwrap();
        assert!(!timeline.exists());
    }

    #[test]
    fn a_run_goes_on_only_where_steps_are_left() {
        assert_eq!(nothing_left(8, 12, None), None);
        assert_eq!(nothing_left(8, 12, Some(9)), None);
        for (steps, until, limit) in
            [(8, None, "recipe.steps is 8"), (4, Some(9), "recipe.steps is 4"), (12, Some(8), "--until is 8")]
        {
            let reason = nothing_left(8, steps, until).unwrap();
            assert!(reason.starts_with("has trained 8 steps already") && reason.contains(limit), "{reason}");
        }
    }

    #[test]
    fn a_run_goes_on_only_with_its_tokenizer() {
        let [one, other] = ["one", "other"].map(|text| Hash::of_bytes(text.as_bytes()));
        assert_eq!(other_tokenizer(Some(&one), &one), None);
        assert_eq!(other_tokenizer(None, &one), None, "a checkpoint that names none");
        let reason = other_tokenizer(Some(&one), &other).unwrap();
        assert!(reason.contains(one.short()) && reason.contains("--data"), "{reason}");
    }
}
