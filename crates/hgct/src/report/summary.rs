//! `summary.json`: what a run knows of itself beside plan, metrics and timeline.

use std::collections::BTreeMap;

use hgct_core::cluster::{Grant, Isolation};
use hgct_core::ids::{DeviceId, Kind, NodeId, RunId};
use hgct_core::plan::Plan;
use serde::{Deserialize, Serialize};

/// The document. What is not known is absent, and the report says so.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunSummary {
    /// Version of this document's form.
    pub(crate) format: u32,
    /// The run.
    pub(crate) run: RunId,
    /// The job's file, as a command would name it.
    #[serde(default)]
    pub(crate) job: Option<String>,
    /// When it began, `YYYY-MM-DDThh:mm:ssZ`.
    #[serde(default)]
    pub(crate) started_at: Option<String>,
    /// How it ended.
    pub(crate) ended: Ended,
    /// Steps that the job asks for.
    pub(crate) steps: u64,
    /// What was trained.
    pub(crate) model: ModelSummary,
    /// On what.
    #[serde(default)]
    pub(crate) data: DataSummary,
    /// The devices of the plan, in rank order.
    pub(crate) devices: Vec<DeviceSummary>,
    /// Devices that were there and took no part.
    #[serde(default)]
    pub(crate) set_aside: Vec<SetAside>,
    /// How grants were held.
    pub(crate) isolation: Isolation,
    /// The same in words, with the reason where they were not.
    #[serde(default)]
    pub(crate) isolation_note: Option<String>,
    /// Seconds of each part of the command.
    #[serde(default)]
    pub(crate) times: Times,
    /// The newest committed checkpoint.
    #[serde(default)]
    pub(crate) checkpoint: Option<CheckpointSummary>,
    /// What the model writes.
    #[serde(default)]
    pub(crate) samples: Vec<Sample>,
    /// Memory of the processes.
    #[serde(default)]
    pub(crate) memory: MemorySummary,
    /// What happened, in order.
    #[serde(default)]
    pub(crate) events: Vec<String>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub(crate) enum Ended {
    /// At its last step.
    Trained,
    /// By a stop, with a checkpoint.
    Stopped,
    /// By an error.
    Failed {
        /// Worker, device and cause.
        cause: String,
    },
    /// Not told: the process died, or goes on.
    Unknown,
}

/// The model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelSummary {
    /// A name for people.
    pub(crate) name: String,
    /// Parameters; a tied embedding counts once.
    pub(crate) parameters: u64,
}

/// The text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct DataSummary {
    /// What it is, for people.
    pub(crate) name: Option<String>,
    /// What `--data` put in place of the job's text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) given: Vec<String>,
    /// Tokens to train on.
    pub(crate) tokens: Option<u64>,
    /// Tokens held out.
    pub(crate) held_out_tokens: Option<u64>,
    /// Cross-entropy of a bigram model on the held-out tokens, nats a token.
    pub(crate) bigram_nats: Option<f64>,
    /// The same of a unigram model.
    pub(crate) unigram_nats: Option<f64>,
}

/// What continues a run: its text must be the one that it began with.
pub(crate) fn resume_command(job: &str, data: &[String], run: &str) -> String {
    let data: Vec<String> = data.iter().map(|path| format!(" --data {}", shell_word(path))).collect();
    let data = data.concat();
    format!("hgct train {}{data} --resume {run}", shell_word(job))
}

/// Text as one word for a shell.
fn shell_word(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-+:,=@%".contains(&b);
    if text.bytes().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// One device of the plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeviceSummary {
    /// The device.
    pub(crate) device: DeviceId,
    /// Its kind.
    pub(crate) kind: Kind,
    /// Framework and version, such as `torch 2.9.0`.
    pub(crate) framework: String,
    /// Its grant.
    pub(crate) grant: Grant,
}

/// A device without a part in the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetAside {
    /// Its name.
    pub(crate) device: String,
    /// Why.
    pub(crate) reason: String,
}

/// Seconds of each part; absent where a part was not done.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Times {
    /// Environments and build, before the command.
    pub(crate) set_up: Option<f64>,
    /// Text to tokens.
    pub(crate) data: Option<f64>,
    /// Conformance suite.
    pub(crate) check: Option<f64>,
    /// Measurement.
    pub(crate) profile: Option<f64>,
    /// Search.
    pub(crate) plan: Option<f64>,
    /// First step to last, evaluations and checkpoints included.
    pub(crate) train: Option<f64>,
    /// The command from start to end.
    pub(crate) total: Option<f64>,
}

/// A committed checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CheckpointSummary {
    /// Its folder.
    pub(crate) path: String,
    /// Steps trained.
    pub(crate) step: u64,
}

/// Text that the model continues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sample {
    /// What it was given.
    pub(crate) prompt: String,
    /// What it added.
    pub(crate) text: String,
}

/// Memory, bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MemorySummary {
    /// Peak of the coordinator.
    pub(crate) coordinator_bytes: Option<u64>,
    /// Peak of each node's agent.
    pub(crate) agents: BTreeMap<NodeId, u64>,
    /// A plain loop of the same framework, model and micro-batches, where one was measured.
    pub(crate) plain_loops: BTreeMap<DeviceId, u64>,
}

impl RunSummary {
    /// The current form.
    pub(crate) const FORMAT: u32 = 1;

    /// What the plan alone says, for a run that left no summary, and to be filled in.
    pub(crate) fn of_plan(run: RunId, plan: &Plan) -> Self {
        let device = |rank: &hgct_core::plan::PlanRank| DeviceSummary {
            device: rank.device.clone(),
            kind: rank.kind.clone(),
            framework: String::new(),
            grant: rank.grant.clone(),
        };
        Self {
            format: Self::FORMAT,
            model: ModelSummary { name: run.to_string(), parameters: plan.model.num_parameters() },
            run,
            job: None,
            started_at: None,
            ended: Ended::Unknown,
            steps: 0,
            data: DataSummary::default(),
            devices: plan.ranks.iter().map(device).collect(),
            set_aside: Vec::new(),
            isolation: plan.isolation,
            isolation_note: None,
            times: Times::default(),
            checkpoint: None,
            samples: Vec::new(),
            memory: MemorySummary::default(),
            events: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_continued_with_its_own_text() {
        assert_eq!(resume_command("job.toml", &[], "one"), "hgct train job.toml --resume one");
        let data = ["/a/b.txt".to_owned(), "/it's here/*".to_owned()];
        assert_eq!(
            resume_command("job.toml", &data, "one"),
            r"hgct train job.toml --data /a/b.txt --data '/it'\''s here/*' --resume one"
        );
    }
}
