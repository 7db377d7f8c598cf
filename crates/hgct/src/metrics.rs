//! `metrics.jsonl`: one object a line, appended while the run goes on, so that a run that dies has
//! said all it knew.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use hgct_control::message::StepReport;
use hgct_core::canonical::Hash;
use hgct_core::ids::DeviceId;
use hgct_core::plan::Plan;
use serde::{Deserialize, Deserializer, Serialize};

/// One line. A number that is not finite is written as `null`, which JSON has in its place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub(crate) enum Row {
    /// Training begins, or goes on.
    Begin {
        /// Steps trained so far; what an earlier life of the run did beyond them is given up.
        step: u64,
        /// Hash of the plan.
        plan: Hash,
    },
    /// A step is done on all ranks.
    Step(StepRow),
    /// The held-out split was evaluated.
    Evaluation(EvaluationRow),
    /// A checkpoint was committed.
    Checkpoint(CheckpointRow),
    /// Anything else that people want to know.
    Event {
        /// What happened.
        text: String,
    },
}

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct StepRow {
    /// The step, from 0.
    pub(crate) step: u64,
    /// Mean over the step's tokens, nats a token.
    #[serde(deserialize_with = "null_is_nan")]
    pub(crate) loss: f64,
    /// Global norm of the mean loss's gradient before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub(crate) grad_norm: f64,
    /// Learning rate.
    pub(crate) learning_rate: f64,
    /// Whether all ranks left the update out because loss or norm was not finite.
    pub(crate) skipped: bool,
    /// Tokens of the step.
    pub(crate) tokens: u64,
    /// The slowest rank's step.
    pub(crate) step_seconds: f64,
    /// `tokens / step_seconds`.
    pub(crate) tokens_per_second: f64,
    /// A row a device, in rank order.
    pub(crate) devices: Vec<DeviceRow>,
    /// Since training began in this process.
    pub(crate) elapsed_seconds: f64,
}

/// One device in one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct DeviceRow {
    /// The device.
    pub(crate) device: DeviceId,
    /// Share of its step in forward and backward, 0 to 1.
    pub(crate) busy_share: f64,
    /// In reduce, update and gather.
    pub(crate) exchange_seconds: f64,
    /// In gaps of compute with a transfer pending.
    pub(crate) exposed_communication_seconds: f64,
    /// Resident memory of the worker.
    pub(crate) memory_bytes: u64,
}

/// One evaluation of the held-out split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct EvaluationRow {
    /// Steps trained so far.
    pub(crate) step: u64,
    /// Nats a token.
    #[serde(deserialize_with = "null_is_nan")]
    pub(crate) loss: f64,
    /// Tokens that were predicted.
    pub(crate) tokens: u64,
}

/// One committed checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct CheckpointRow {
    /// Steps trained: its name.
    pub(crate) step: u64,
    /// Its size.
    pub(crate) bytes: u64,
    /// From the first chunk to the commit.
    pub(crate) seconds: f64,
}

impl StepRow {
    /// The row of a step from what its ranks reported, in rank order; `None` without reports.
    pub(crate) fn of(plan: &Plan, reports: &[StepReport], elapsed_seconds: f64) -> Option<Self> {
        let first = reports.first()?;
        let seconds = |ns: u64| ns as f64 / 1e9;
        let step_seconds = seconds(reports.iter().map(|report| report.step_ns).max()?.max(1));
        let device = |(rank, report): (&hgct_core::plan::PlanRank, &StepReport)| DeviceRow {
            device: rank.device.clone(),
            busy_share: report.compute_ns as f64 / report.step_ns.max(1) as f64,
            exchange_seconds: seconds(report.exchange_ns),
            exposed_communication_seconds: seconds(report.exposed_communication_ns),
            memory_bytes: report.memory_bytes,
        };
        Some(Self {
            step: first.step,
            loss: first.loss_sum / first.num_tokens as f64,
            grad_norm: first.grad_norm,
            learning_rate: first.learning_rate,
            skipped: first.skipped,
            tokens: first.num_tokens,
            step_seconds,
            tokens_per_second: first.num_tokens as f64 / step_seconds,
            devices: plan.ranks.iter().zip(reports).map(device).collect(),
            elapsed_seconds,
        })
    }
}

/// Appends rows.
#[derive(Debug)]
pub(crate) struct Writer {
    file: File,
    path: PathBuf,
}

impl Writer {
    /// Opens the file, made if it is not there, behind its last whole line: what a dying process
    /// left of a line goes.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let open = || -> std::io::Result<File> {
            let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
            let length = file.metadata()?.len();
            let whole = end_of_whole_lines(&mut file, length)?;
            if whole < length {
                file.set_len(whole)?;
            }
            Ok(file)
        };
        let file = open().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Appends a row with one write, so that it stands in the file when this returns.
    pub(crate) fn write(&mut self, row: &Row) -> Result<()> {
        let mut line = serde_json::to_string(row).context("a row of metrics does not encode")?;
        line.push('\n');
        let mut write = || -> std::io::Result<()> {
            self.file.write_all(line.as_bytes())?;
            self.file.flush()
        };
        write().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// All rows of a run but for what was given up: each step as it was done last.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Metrics {
    /// Steps, ascending.
    pub(crate) steps: Vec<StepRow>,
    /// Evaluations, ascending.
    pub(crate) evaluations: Vec<EvaluationRow>,
    /// Checkpoints, ascending.
    pub(crate) checkpoints: Vec<CheckpointRow>,
    /// Events, as they came.
    pub(crate) events: Vec<String>,
    /// The plan from a step on.
    plans: BTreeMap<u64, Hash>,
}

impl Metrics {
    /// Reads a file; a torn last line is passed over, any other damage is an error with its line.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&bytes, &path.to_string_lossy())
    }

    fn parse(bytes: &[u8], file: &str) -> Result<Self> {
        let (mut steps, mut evaluations, mut checkpoints) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut plans = BTreeMap::new();
        let mut events = Vec::new();
        let lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
        for (index, line) in lines.iter().enumerate() {
            if line.trim_ascii().is_empty() || (index + 1 == lines.len() && !line.ends_with(b"\n")) {
                continue;
            }
            let row = serde_json::from_slice(line).with_context(|| format!("{file}, line {}", index + 1))?;
            match row {
                Row::Begin { step, plan } => {
                    // A row of a step stands before it is done, all others behind it.
                    steps.retain(|at, _| *at < step);
                    evaluations.retain(|at, _| *at <= step);
                    checkpoints.retain(|at, _| *at <= step);
                    plans.retain(|at, _| *at < step);
                    plans.insert(step, plan);
                }
                Row::Step(row) => drop(steps.insert(row.step, row)),
                Row::Evaluation(row) => drop(evaluations.insert(row.step, row)),
                Row::Checkpoint(row) => drop(checkpoints.insert(row.step, row)),
                Row::Event { text } => events.push(text),
            }
        }
        Ok(Self {
            steps: steps.into_values().collect(),
            evaluations: evaluations.into_values().collect(),
            checkpoints: checkpoints.into_values().collect(),
            events,
            plans,
        })
    }

    /// The steps that were done under a plan; one whose plan is not told may have been.
    pub(crate) fn steps_under(&self, plan: &Hash) -> Vec<&StepRow> {
        let is_under = |step: u64| self.plans.range(..=step).next_back().is_none_or(|(_, of)| of == plan);
        self.steps.iter().filter(|row| is_under(row.step)).collect()
    }
}

/// Where the last whole line ends, looked for from the end: a long run's file is not read through.
fn end_of_whole_lines(file: &mut File, length: u64) -> std::io::Result<u64> {
    const PIECE: u64 = 4096;
    let mut end = length;
    let mut buffer = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(PIECE);
        file.seek(SeekFrom::Start(start))?;
        buffer.resize((end - start) as usize, 0);
        file.read_exact(&mut buffer)?;
        if let Some(at) = buffer.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn step(step: u64, loss: f64) -> StepRow {
        StepRow {
            step,
            loss,
            grad_norm: 0.5,
            learning_rate: 1e-3,
            skipped: false,
            tokens: 4096,
            step_seconds: 0.25,
            tokens_per_second: 16384.0,
            devices: vec![DeviceRow {
                device: DeviceId::new("local/torch:0").unwrap(),
                busy_share: 0.9,
                exchange_seconds: 0.01,
                exposed_communication_seconds: 0.002,
                memory_bytes: 1 << 28,
            }],
            elapsed_seconds: 1.0,
        }
    }

    fn rows() -> Vec<Row> {
        vec![
            Row::Begin { step: 0, plan: Hash::of_bytes(b"plan") },
            Row::Step(step(0, 7.5)),
            Row::Evaluation(EvaluationRow { step: 1, loss: 7.25, tokens: 100 }),
            Row::Checkpoint(CheckpointRow { step: 1, bytes: 10, seconds: 0.5 }),
            Row::Event { text: "stopped\nafter \"1\" step".into() },
        ]
    }

    #[test]
    fn what_was_written_is_read_and_a_resumed_step_replaces_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = Writer::open(&path).unwrap();
        for row in rows() {
            writer.write(&row).unwrap();
        }
        Writer::open(&path).unwrap().write(&Row::Step(step(0, 7.125))).unwrap();
        let metrics = Metrics::read(&path).unwrap();
        assert_eq!(metrics.steps, [step(0, 7.125)]);
        assert_eq!(metrics.evaluations.len() + metrics.checkpoints.len() + metrics.events.len(), 3);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 6);
    }

    #[test]
    fn what_a_resumed_run_gives_up_does_not_count() {
        let [first, second] = [&b"first"[..], b"second"].map(Hash::of_bytes);
        let life = |from: u64, to: u64, plan: &Hash| {
            let mut rows = vec![Row::Begin { step: from, plan: plan.clone() }];
            for at in from..to {
                rows.push(Row::Step(step(at, 7.5)));
                rows.push(Row::Evaluation(EvaluationRow { step: at + 1, loss: 7.25, tokens: 100 }));
                rows.push(Row::Checkpoint(CheckpointRow { step: at + 1, bytes: 10, seconds: 0.5 }));
            }
            rows
        };
        let read = |lives: &[Vec<Row>]| {
            let line = |row: &Row| serde_json::to_string(row).unwrap() + "\n";
            Metrics::parse(lives.iter().flatten().map(line).collect::<String>().as_bytes(), "m").unwrap()
        };
        let under = |metrics: &Metrics, plan: &Hash| -> Vec<u64> {
            metrics.steps_under(plan).iter().map(|row| row.step).collect()
        };
        // Nine steps, and from the sixth on again under another plan, to the seventh.
        let metrics = read(&[life(0, 9, &first), life(5, 7, &second)]);
        let counts = (metrics.steps.len(), metrics.evaluations.len(), metrics.checkpoints.len());
        assert_eq!(counts, (7, 7, 7));
        assert_eq!((under(&metrics, &first), under(&metrics, &second)), (vec![0, 1, 2, 3, 4], vec![5, 6]));
        // A life that ends before its first step has given up what lies ahead of it.
        assert_eq!(read(&[life(0, 9, &first), life(5, 5, &second)]).steps.len(), 5);
    }

    #[test]
    fn a_step_that_is_not_finite_is_null_and_reads_as_nan() {
        let text =
            serde_json::to_string(&Row::Step(StepRow { grad_norm: f64::INFINITY, ..step(3, f64::NAN) }))
                .unwrap();
        assert!(text.contains(r#""loss":null,"grad_norm":null"#), "{text}");
        let metrics = Metrics::parse(format!("{text}\n").as_bytes(), "m").unwrap();
        assert!(metrics.steps[0].loss.is_nan() && metrics.steps[0].grad_norm.is_nan());
    }

    #[test]
    fn damage_before_the_last_line_is_an_error_with_its_line() {
        let error = Metrics::parse(b"{\"type\":\"event\",\"text\":\"a\"}\n{\"type\":\n", "metrics.jsonl")
            .unwrap_err();
        assert_eq!(error.to_string(), "metrics.jsonl, line 2");
    }

    proptest! {
        #[test]
        fn any_cut_reads_as_the_whole_lines_before_it_and_can_be_continued(cut in 0usize..1000) {
            let text: String = rows().iter().map(|row| serde_json::to_string(row).unwrap() + "\n").collect();
            let cut = cut % (text.len() + 1);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("metrics.jsonl");
            std::fs::write(&path, &text[..cut]).unwrap();
            let whole = text[..cut].matches('\n').count();
            let count = |m: &Metrics| m.steps.len() + m.evaluations.len() + m.checkpoints.len() + m.events.len() + m.plans.len();
            prop_assert_eq!(count(&Metrics::read(&path).unwrap()), whole);
            Writer::open(&path).unwrap().write(&Row::Event { text: "again".into() }).unwrap();
            prop_assert_eq!(count(&Metrics::read(&path).unwrap()), whole + 1);
        }
    }
}
