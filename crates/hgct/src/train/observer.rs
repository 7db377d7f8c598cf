//! What a run leaves behind while it goes on: metrics, events, a timeline, lines for people.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use hgct_control::coordinator::ClockOffset;
use hgct_control::message::StepReport;
use hgct_core::canonical::Hash;
use hgct_core::ids::{DeviceId, Rank, RunId};
use hgct_core::plan::Plan;
use hgct_core::timeline::{ActionSpan, RankTimeline, Timeline, TimelineSource, TransferSpan};
use hgct_data::TokenFile;
use hgct_data::tokenizer::Tokenizer;

use super::checkpoints::Done;
use super::{Chosen, write_document};
use crate::display::{Display, Progress};
use crate::job::{LoadedJob, PreparedData};
use crate::metrics::{CheckpointRow, EvaluationRow, Row, StepRow, Writer};
use crate::report::summary::{CheckpointSummary, DataSummary, Ended, RunSummary, Sample, SetAside, Times};
use crate::session::Session;
use crate::stages::Fleet;

/// Measured spans that are kept: the newest steps.
const KEEP_STEPS: usize = 3;

pub(super) struct Observer {
    folder: PathBuf,
    plan: Plan,
    metrics: Writer,
    display: Option<Display>,
    summary: RunSummary,
    begun: Instant,
    spans: BTreeMap<u64, BTreeMap<Rank, RankTimeline>>,
}

impl Observer {
    /// Opens the run's files; from now on the summary says what is known.
    pub(super) fn open(
        folder: &Path,
        run: &RunId,
        loaded: &LoadedJob,
        fleet: &Fleet,
        chosen: &Chosen,
        data: &PreparedData,
    ) -> Result<Self> {
        let plan = chosen.plan.clone();
        let recipe = &loaded.job.recipe;
        let mut summary = RunSummary::of_plan(run.clone(), &plan);
        summary.job = Some(loaded.path.to_string_lossy().into_owned());
        summary.steps = recipe.steps;
        summary.model.name.clone_from(&loaded.job.name);
        let meta = &data.prepared.meta;
        summary.data = DataSummary {
            name: Some(loaded.job.data.paths.join(", ")),
            given: loaded.other_data().to_vec(),
            tokens: Some(meta.train_tokens),
            held_out_tokens: Some(meta.held_out_tokens),
            bigram_nats: data.baselines.as_ref().map(|baselines| baselines.bigram_nats),
            unigram_nats: data.baselines.as_ref().map(|baselines| baselines.unigram_nats),
        };
        for device in &mut summary.devices {
            if let Some((_, spec)) = fleet.cluster.device(&device.device) {
                device.framework = format!("{} {}", spec.engine, spec.framework_version);
            }
        }
        let set_aside = |(device, reason): &(DeviceId, String)| SetAside {
            device: device.to_string(),
            reason: reason.clone(),
        };
        summary.set_aside = fleet.set_aside.iter().map(set_aside).collect();
        summary.set_aside.extend(fleet.unusable.iter().map(|(node, row)| SetAside {
            device: format!("{node}: {}", row.name),
            reason: row.reason.clone(),
        }));
        summary.isolation_note = Some(fleet.isolation_note.clone()).filter(|note| !note.is_empty());
        Ok(Self {
            folder: folder.to_owned(),
            metrics: Writer::open(&folder.join("metrics.jsonl"))?,
            display: None,
            plan,
            summary,
            begun: Instant::now(),
            spans: BTreeMap::new(),
        })
    }

    /// Shows progress from now on: after `resumed` steps of an earlier run, to `end_step`.
    pub(super) fn watch(&mut self, resumed: Option<u64>, end_step: u64) -> Result<()> {
        let progress = Progress::new(self.summary.run.as_str(), end_step, resumed.unwrap_or(0));
        self.display = Some(Display::stderr(progress));
        let plan = Hash::of(&self.plan);
        self.metrics.write(&Row::Begin { step: resumed.unwrap_or(0), plan })?;
        resumed.map_or(Ok(()), |step| self.event(&format!("resumed after step {step}")))
    }

    pub(super) fn step(&mut self, reports: &[StepReport]) -> Result<()> {
        let Some(row) = StepRow::of(&self.plan, reports, self.begun.elapsed().as_secs_f64()) else {
            return Ok(());
        };
        if let Some(display) = &mut self.display {
            display.step(&row);
        }
        self.metrics.write(&Row::Step(row))
    }

    pub(super) fn skipped(&mut self, step: u64, in_a_row: u32) -> Result<()> {
        self.event(&format!("step {step} was skipped on all ranks: its loss or gradient norm is not finite ({in_a_row} in a row)"))
    }

    pub(super) fn evaluated(&mut self, step: u64, loss_sum: f64, tokens: u64) -> Result<()> {
        let loss = loss_sum / tokens as f64;
        if let Some(display) = &mut self.display {
            display.evaluated(loss);
        }
        self.metrics.write(&Row::Evaluation(EvaluationRow { step, loss, tokens }))
    }

    pub(super) fn checkpoint(&mut self, done: &Done) -> Result<()> {
        let path = self.folder.join("checkpoints").join(format!("step-{:08}", done.step));
        self.summary.checkpoint =
            Some(CheckpointSummary { path: path.to_string_lossy().into_owned(), step: done.step });
        self.metrics.write(&Row::Checkpoint(CheckpointRow {
            step: done.step,
            bytes: done.size_bytes,
            seconds: done.seconds,
        }))
    }

    pub(super) fn event(&mut self, text: &str) -> Result<()> {
        match &mut self.display {
            Some(display) => display.message(text),
            None => eprintln!("{text}"),
        }
        self.summary.events.push(text.to_owned());
        self.metrics.write(&Row::Event { text: text.to_owned() })
    }

    /// A rank's spans, moved into the coordinator's time.
    pub(super) fn spans(
        &mut self,
        rank: Rank,
        step: u64,
        clock: ClockOffset,
        mut actions: Vec<ActionSpan>,
        mut transfers: Vec<TransferSpan>,
    ) {
        let shift = |ns: &mut u64| *ns = ns.saturating_add_signed(clock.offset_ns);
        for span in &mut actions {
            shift(&mut span.start_ns);
            shift(&mut span.end_ns);
        }
        for span in &mut transfers {
            shift(&mut span.start_ns);
            shift(&mut span.end_ns);
        }
        let timeline = RankTimeline {
            rank,
            device: self.plan.ranks[rank.index()].device.clone(),
            clock_offset_ns: clock.offset_ns,
            clock_uncertainty_ns: clock.uncertainty_ns,
            actions,
            transfers,
        };
        self.spans.entry(step).or_default().insert(rank, timeline);
        while self.spans.len() > KEEP_STEPS {
            self.spans.pop_first();
        }
    }

    pub(super) fn tick(&mut self) {
        if let Some(display) = &mut self.display {
            display.tick();
        }
    }

    pub(super) fn finished(&mut self, step: u64, stopped: bool) -> Result<()> {
        self.summary.ended = if stopped { Ended::Stopped } else { Ended::Trained };
        if let Some(display) = self.display.take() {
            display.finish();
        }
        self.event(&format!("{} after {step} steps", if stopped { "stopped" } else { "trained" }))
    }

    /// Beginnings of held-out samples, of equal length.
    pub(super) fn prompts(&self, data: &PreparedData) -> Result<Vec<Vec<u32>>> {
        let plan = &self.plan;
        let held_out = TokenFile::open(&data.prepared.held_out_path())?;
        let length = (plan.seq_len / 4).clamp(1, 24);
        let Ok(samples) = held_out.samples(plan.seq_len) else { return Ok(Vec::new()) };
        let count = u64::from(plan.pipelines[0].micro_batch).min(3).min(samples.len());
        let take = |index: u64| Ok(samples.get(index * samples.len() / count)?.0[..length as usize].to_vec());
        (0..count).map(take).collect()
    }

    pub(super) fn generated(
        &mut self,
        prompts: &[Vec<u32>],
        sequences: &[Vec<u32>],
        data: &PreparedData,
    ) -> Result<()> {
        let tokenizer = Tokenizer::open(&data.prepared.tokenizer_path(), None)?;
        for (prompt, sequence) in prompts.iter().zip(sequences) {
            self.summary.samples.push(Sample {
                prompt: tokenizer.decode(prompt)?,
                text: tokenizer.decode(&sequence[prompt.len().min(sequence.len())..])?,
            });
        }
        Ok(())
    }

    /// Memory of plain loops of the same layers.
    pub(super) fn compared(&mut self, peaks: BTreeMap<DeviceId, u64>) {
        self.summary.memory.plain_loops = peaks;
    }

    /// Writes what the report is made of. `failed`: why the run did not end as it should.
    pub(super) fn close(
        &mut self,
        session_memory: Memory,
        started_at: String,
        times: Times,
        failed: Option<String>,
    ) -> Result<()> {
        self.summary.started_at = Some(started_at);
        if let Some(display) = self.display.take() {
            display.finish();
        }
        if let Some(cause) = failed {
            self.event(&cause)?;
            self.summary.ended = Ended::Failed { cause };
        }
        self.summary.times = times;
        self.summary.memory.agents = session_memory.agents;
        self.summary.memory.coordinator_bytes = session_memory.coordinator_bytes;
        write_document(&self.folder.join("summary.json"), &self.summary)?;
        let num_ranks = self.plan.ranks.len();
        let complete =
            self.spans.iter().rev().find(|(_, ranks)| ranks.len() == num_ranks).map(|(step, _)| *step);
        if let Some(step) = complete {
            let ranks = self.spans.remove(&step).unwrap_or_default().into_values().collect();
            let timeline = Timeline {
                format: Timeline::FORMAT,
                source: TimelineSource::Measured,
                first_step: step,
                ranks,
            };
            write_document(&self.folder.join("timeline.json"), &timeline)?;
        }
        Ok(())
    }
}

/// Peak memory of coordinator and agents, bytes.
#[derive(Default)]
pub(super) struct Memory {
    agents: BTreeMap<hgct_core::ids::NodeId, u64>,
    coordinator_bytes: Option<u64>,
}

impl Memory {
    pub(super) fn of(session: &Session) -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let peak = status.lines().find_map(|line| {
            line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        });
        Self { agents: session.agent_memory.clone(), coordinator_bytes: peak.map(|kib| kib * 1024) }
    }
}
