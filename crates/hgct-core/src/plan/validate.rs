//! The invariants of a plan. Whatever a file says, checking it neither panics nor takes long.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::model::TensorSpec;
use crate::schedule::Schedule;
use crate::slice::{Slice, block_rows};
use crate::{Error, Result};

use super::{Holder, OwnedGroup, Plan, StageId, UpdateSite, holders_of_tensors};

/// Micro-batches a step at most, so that a damaged file cannot ask for endless action lists.
const MAX_MICRO_BATCHES: u64 = 1 << 20;
/// Ranks at most.
const MAX_RANKS: usize = 1 << 16;

impl Plan {
    /// Checks the invariants P-2 (every layer exactly once in every pipeline), P-3 (micro-batches
    /// sum to the global batch), that every slice has one owner and all its holders and is cut where
    /// update blocks are, and that the schedule is the plan's (P-1).
    pub fn validate(&self) -> Result<()> {
        let fail = |invariant, found| Err(Error::Plan { invariant, found });
        if self.format != Self::FORMAT {
            return fail("format", format!("{} (this hgct reads {})", self.format, Self::FORMAT));
        }
        self.validate_shape()?;
        self.validate_owners()?;
        let schedule = Schedule::of(self)?;
        schedule.dry_run(self)?;
        if schedule.hash() != self.schedule {
            return fail(
                "P-1",
                format!(
                    "the schedule's hash is {}, the plan says {}",
                    schedule.hash().short(),
                    self.schedule.short()
                ),
            );
        }
        if let Some(prediction) = self.prediction.as_ref().filter(|p| p.ranks.len() != self.ranks.len()) {
            return fail(
                "P-6",
                format!("the prediction has {} rows for {} ranks", prediction.ranks.len(), self.ranks.len()),
            );
        }
        Ok(())
    }

    /// Everything but owners and the schedule's hash.
    pub(super) fn validate_shape(&self) -> Result<()> {
        let fail = |invariant, found| Err(Error::Plan { invariant, found });
        self.model.validate("plan")?;
        self.wire_dtype.require_compute_supported()?;
        self.master_dtype.require_compute_supported()?;
        if self.global_batch == 0 || self.seq_len == 0 {
            return fail("P-3", format!("{} samples of {} tokens a step", self.global_batch, self.seq_len));
        }
        if self.ranks.is_empty() || self.ranks.len() > MAX_RANKS {
            return fail("ranks", format!("{} ranks, allowed are 1 to {MAX_RANKS}", self.ranks.len()));
        }
        let mut devices: Vec<_> = self.ranks.iter().map(|rank| &rank.device).collect();
        devices.sort_unstable();
        if let Some(at) = (1..devices.len()).find(|at| devices[at - 1] == devices[*at]) {
            return fail("ranks", format!("{} has two ranks", devices[at]));
        }
        self.validate_stages()?;
        self.validate_pipelines()
    }

    fn validate_stages(&self) -> Result<()> {
        let fail = |invariant, found| Err(Error::Plan { invariant, found });
        let mut used = vec![false; self.ranks.len()];
        for (id, stage) in (0..).map(StageId).zip(&self.stages) {
            stage.compute_dtype.require_compute_supported()?;
            if stage.ranks.len() != 1 {
                return Err(Error::NotYet {
                    what: "tensor parallel degree",
                    value: stage.ranks.len().to_string(),
                    instead: "1",
                });
            }
            let Some(rank) = used.get_mut(stage.rank().index()) else {
                return fail(
                    "ranks",
                    format!("{id} is on {}, but there are {} ranks", stage.rank(), self.ranks.len()),
                );
            };
            *rank = true;
        }
        match used.iter().position(|used| !used) {
            Some(rank) => {
                fail("ranks", format!("rank {rank} ({}) has no stage; leave it out", self.ranks[rank].device))
            }
            None => Ok(()),
        }
    }

    fn validate_pipelines(&self) -> Result<()> {
        let fail = |invariant, found| Err(Error::Plan { invariant, found });
        let num_layers = self.model.num_placeable_layers();
        let mut uses = vec![0u32; self.stages.len()];
        for (index, pipeline) in self.pipelines.iter().enumerate() {
            if pipeline.micro_batch == 0 || pipeline.num_micro_batches == 0 {
                return fail("P-3", format!("pipeline {index} has no micro-batches"));
            }
            let mut next = 0;
            for id in &pipeline.stages {
                let Some(stage) = self.stages.get(id.index()) else {
                    return fail("P-2", format!("pipeline {index} names {id}, which is not there"));
                };
                uses[id.index()] += 1;
                if stage.first_layer != next || stage.end_layer <= next {
                    return fail(
                        "P-2",
                        format!(
                            "pipeline {index}: {id} has layers {:?} where layer {next} comes next",
                            stage.layers()
                        ),
                    );
                }
                next = stage.end_layer;
            }
            if next != num_layers {
                return fail("P-2", format!("pipeline {index} ends at layer {next} of {num_layers}"));
            }
        }
        match uses.iter().position(|uses| *uses != 1) {
            Some(stage) if uses[stage] == 0 => {
                return fail("P-2", format!("stage {stage} is in no pipeline"));
            }
            Some(stage) => {
                return Err(Error::NotYet {
                    what: "sharing",
                    value: format!("stage {stage} by {} pipelines", uses[stage]),
                    instead: "one pipeline a stage instance",
                });
            }
            None => {}
        }
        let samples: u64 = self.pipelines.iter().map(super::Pipeline::num_samples).sum();
        if samples != u64::from(self.global_batch) {
            return fail(
                "P-3",
                format!("micro-batches hold {samples} samples, the global batch {}", self.global_batch),
            );
        }
        let micro_batches: u64 = self.pipelines.iter().map(|p| u64::from(p.num_micro_batches)).sum();
        if micro_batches > MAX_MICRO_BATCHES {
            return fail("P-3", format!("{micro_batches} micro-batches, at most {MAX_MICRO_BATCHES}"));
        }
        Ok(())
    }

    /// Needs a plan whose shape is valid.
    fn validate_owners(&self) -> Result<()> {
        let fail = |found| Err(Error::Plan { invariant: "owners", found });
        let tensors: BTreeMap<String, TensorSpec> =
            self.model.tensors().into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        let holders = holders_of_tensors(&self.model, &self.stages);
        let mut covered: BTreeMap<&str, Vec<Range<u64>>> = BTreeMap::new();
        for group in &self.owners {
            self.validate_group(group, &tensors, &holders)?;
            for slice in &group.slices {
                covered.entry(&slice.tensor).or_default().push(slice.rows());
            }
        }
        for tensor in tensors.values() {
            let mut ranges = covered.remove(tensor.name.as_str()).unwrap_or_default();
            ranges.sort_by_key(|range| (range.start, range.end));
            let mut next = 0;
            for range in ranges {
                if range.start != next {
                    let row = range.start.min(next);
                    return fail(format!("row {row} of {} has no owner or two", tensor.name));
                }
                next = range.end;
            }
            if next != tensor.rows() {
                return fail(format!("row {next} of {} has no owner", tensor.name));
            }
        }
        Ok(())
    }

    fn validate_group(
        &self,
        group: &OwnedGroup,
        tensors: &BTreeMap<String, TensorSpec>,
        holders: &BTreeMap<String, Vec<Holder>>,
    ) -> Result<()> {
        let fail = |found| Err(Error::Plan { invariant: "owners", found });
        let num_parameters = self.model.num_parameters();
        if group.site != UpdateSite::Host {
            return Err(Error::NotYet { what: "update site", value: "device".into(), instead: "host" });
        }
        let rank_of = |holder: &Holder| self.stages.get(holder.stage.index()).map(super::StageInstance::rank);
        if !group.holders.iter().any(|holder| rank_of(holder) == Some(group.owner)) {
            return fail(format!("{} owns slices of which it holds none", group.owner));
        }
        if group.slices.is_empty() {
            return fail(format!("{} owns a group without slices", group.owner));
        }
        for slice in &group.slices {
            let Some(tensor) = tensors.get(&slice.tensor) else {
                return fail(format!("{} is no tensor of the model", slice.tensor));
            };
            let inside = slice.begin.len() == tensor.shape.len()
                && slice.end.len() == tensor.shape.len()
                && (0..tensor.shape.len())
                    .all(|d| slice.begin[d] < slice.end[d] && slice.end[d] <= tensor.shape[d]);
            if !inside {
                return fail(format!("{slice} is not inside of shape {:?}", tensor.shape));
            }
            if slice.element_range(tensor).is_none() {
                return Err(Error::NotYet {
                    what: "slice",
                    value: slice.to_string(),
                    instead: "rows of dimension 0",
                });
            }
            if holders.get(&slice.tensor) != Some(&group.holders) {
                return fail(format!("the holders of {slice} are not those that the stages give"));
            }
            if let Some((row, nearest)) = cut_inside_block(slice, tensor, num_parameters) {
                return fail(format!(
                    "{} owns {slice}, cut at row {row} inside of an update block; the nearest cut between \
                     blocks is row {nearest}",
                    group.owner
                ));
            }
        }
        Ok(())
    }
}

/// A row at which a slice of `tensor` is cut though no update block ends there, and the nearest one
/// where one does. A block with two owners is in neither's gradient norm.
fn cut_inside_block(slice: &Slice, tensor: &TensorSpec, num_parameters: u64) -> Option<(u64, u64)> {
    let step = block_rows(tensor, num_parameters);
    let rows = slice.rows();
    let row = [rows.start, rows.end].into_iter().find(|row| row % step != 0 && *row != tensor.rows())?;
    let below = row - row % step;
    let above = below.saturating_add(step).min(tensor.rows());
    Some((row, if row - below <= above - row { below } else { above }))
}
