//! What a run leaves behind while it goes on: metrics, events, a timeline, lines for people.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hgct_control::coordinator::ClockOffset;
use hgct_control::message::StepReport;
use hgct_core::ids::Rank;
use hgct_core::plan::Plan;
use hgct_core::timeline::{ActionSpan, RankTimeline, Timeline, TimelineSource, TransferSpan};
use hgct_data::tokenizer::Tokenizer;

use super::Chosen;
use super::checkpoints::Done;
use crate::job::{LoadedJob, PreparedData};
use crate::session::Session;
use crate::stages::Fleet;

/// Measured spans that are kept: the newest steps.
const KEEP_STEPS: usize = 3;

pub(super) struct Observer {
    metrics: std::fs::File,
    plan: Plan,
    tokens_per_step: u64,
    begun: Instant,
    spans: BTreeMap<u64, BTreeMap<Rank, RankTimeline>>,
    folder: PathBuf,
}

impl Observer {
    pub(super) fn open(
        folder: &Path,
        _loaded: &LoadedJob,
        _fleet: &Fleet,
        chosen: &Chosen,
        _data: &PreparedData,
        _resumed: Option<u64>,
    ) -> Result<Self> {
        let path = folder.join("metrics.jsonl");
        let metrics = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self {
            metrics,
            plan: chosen.plan.clone(),
            tokens_per_step: u64::from(chosen.plan.global_batch) * u64::from(chosen.plan.seq_len),
            begun: Instant::now(),
            spans: BTreeMap::new(),
            folder: folder.to_owned(),
        })
    }

    fn row(&mut self, row: &serde_json::Value) -> Result<()> {
        writeln!(self.metrics, "{row}").context("cannot write metrics.jsonl")
    }

    pub(super) fn step(&mut self, step: u64, reports: &[StepReport]) -> Result<()> {
        let Some(first) = reports.first() else { return Ok(()) };
        let seconds = reports.iter().map(|r| r.step_ns).max().unwrap_or(0) as f64 / 1e9;
        let loss = first.loss_sum / first.num_tokens as f64;
        let busy: Vec<f64> = reports.iter().map(|r| r.compute_ns as f64 / r.step_ns.max(1) as f64).collect();
        eprintln!(
            "step {step} loss {loss:.4} norm {:.3} {:.0} tokens/s busy {:?}",
            first.grad_norm,
            self.tokens_per_step as f64 / seconds,
            busy.iter().map(|b| (b * 100.0).round()).collect::<Vec<_>>()
        );
        self.row(&serde_json::json!({"type": "step", "step": step, "loss": loss, "grad_norm": first.grad_norm,
            "learning_rate": first.learning_rate, "step_seconds": seconds, "elapsed_seconds": self.begun.elapsed().as_secs_f64()}))
    }

    pub(super) fn skipped(&mut self, step: u64, in_a_row: u32) -> Result<()> {
        self.event(&format!("step {step} was skipped on all ranks: loss or norm not finite ({in_a_row} in a row)"))
    }

    pub(super) fn evaluated(&mut self, step: u64, loss_sum: f64, num_tokens: u64) -> Result<()> {
        let loss = loss_sum / num_tokens as f64;
        eprintln!("held-out loss after {step} steps: {loss:.4}");
        self.row(&serde_json::json!({"type": "evaluation", "step": step, "loss": loss, "tokens": num_tokens}))
    }

    pub(super) fn checkpoint(&mut self, done: &Done) -> Result<()> {
        eprintln!("checkpoint of step {} in {:.2} s", done.step, done.seconds);
        self.row(&serde_json::json!({"type": "checkpoint", "step": done.step, "bytes": done.size_bytes, "seconds": done.seconds}))
    }

    pub(super) fn event(&mut self, text: &str) -> Result<()> {
        eprintln!("{text}");
        self.row(&serde_json::json!({"type": "event", "text": text}))
    }

    pub(super) fn spans(&mut self, rank: Rank, step: u64, clock: ClockOffset, actions: Vec<ActionSpan>, transfers: Vec<TransferSpan>) {
        let device = self.plan.ranks[rank.index()].device.clone();
        let shift = |ns: u64| ns.saturating_add_signed(clock.offset_ns);
        let actions = actions
            .into_iter()
            .map(|span| ActionSpan { start_ns: shift(span.start_ns), end_ns: shift(span.end_ns), ..span })
            .collect();
        let transfers = transfers
            .into_iter()
            .map(|span| TransferSpan { start_ns: shift(span.start_ns), end_ns: shift(span.end_ns), ..span })
            .collect();
        let timeline = RankTimeline {
            rank,
            device,
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

    pub(super) fn tick(&mut self) {}

    pub(super) fn finished(&mut self, step: u64, stopped: bool) -> Result<()> {
        self.event(&format!("{} after {step} steps", if stopped { "stopped" } else { "trained" }))
    }

    /// Prompts from the held-out text, of equal length.
    pub(super) fn prompts(&self, plan: &Plan, data: &PreparedData) -> Result<Option<Vec<Vec<u32>>>> {
        let held_out = hgct_data::TokenFile::open(&data.prepared.held_out_path())?;
        let length = (plan.seq_len / 4).clamp(1, 24);
        let Ok(samples) = held_out.samples(plan.seq_len) else { return Ok(None) };
        let count = u64::from(plan.pipelines[0].micro_batch).min(3).min(samples.len());
        let take = |index: u64| Ok(samples.get(index * samples.len() / count)?.0[..length as usize].to_vec());
        (0..count).map(take).collect::<Result<Vec<_>>>().map(Some)
    }

    pub(super) fn generated(&mut self, sequences: &[Vec<u32>], data: &PreparedData) -> Result<()> {
        let tokenizer = Tokenizer::open(&data.prepared.tokenizer_path(), None)?;
        for sequence in sequences {
            eprintln!("the model writes: {}", tokenizer.decode(sequence)?);
        }
        Ok(())
    }

    pub(super) fn memory(&mut self, _session: &Session) {}

    pub(super) fn close(&mut self, _folder: &Path, _total: Duration) -> Result<()> {
        let steps: Vec<u64> = self.spans.iter().filter(|(_, ranks)| ranks.len() == self.plan.ranks.len()).map(|(s, _)| *s).collect();
        let Some(step) = steps.last().copied() else { return Ok(()) };
        let ranks = self.spans.remove(&step).unwrap_or_default().into_values().collect();
        let timeline = Timeline { format: Timeline::FORMAT, source: TimelineSource::Measured, first_step: step, ranks };
        super::write_document(&self.folder.join("timeline.json"), &timeline)
    }
}
