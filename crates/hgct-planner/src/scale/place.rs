//! Which devices hold which stage, and what what-ifs change in that.

use std::collections::{BTreeMap, BTreeSet};

use super::{SLOW_FACTORS, WhatIf};
use crate::instance::{Group, Instance, Layout, Named, Template, assign, bad, lost_nodes, price};
use crate::{Error, Result};

/// One stage of one pipeline.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Unit {
    pub(super) template: usize,
    pub(super) stage: usize,
    /// Index into [`Places::pipelines`].
    pub(super) pipeline: usize,
    /// A group a replica.
    pub(super) groups: Vec<Group>,
    /// By what its slowest device takes longer.
    pub(super) factor: f64,
}

/// One pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PipelinePlace {
    /// Its template.
    pub(super) template: usize,
    /// Its first unit; the others follow.
    pub(super) first_unit: usize,
    /// Micro-batches that it takes.
    pub(super) num_micro_batches: u32,
    /// Plan-wide id of its first one.
    pub(super) first_micro_batch: u32,
}

/// All of them.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Places {
    pub(super) units: Vec<Unit>,
    pub(super) pipelines: Vec<PipelinePlace>,
}

impl Places {
    /// On these devices, or on those that [`assign`] hands out.
    pub(super) fn new(
        instance: &Instance,
        layout: &Layout,
        groups: Option<&[Group]>,
        what_if: &WhatIf,
    ) -> Result<Self> {
        let lost = lost_nodes(instance, &what_if.lose)?;
        let slow = what_if.slow.iter().map(|(name, factor)| {
            if !SLOW_FACTORS.contains(factor) {
                let (least, most) = (SLOW_FACTORS.start(), SLOW_FACTORS.end());
                let allowed = format!("a factor from {least} to {most}");
                return Err(bad("--slow", &format!("{name}={factor}"), &allowed));
            }
            Ok((Named::read(instance, "--slow", name)?, *factor))
        });
        let slow = slow.collect::<Result<Vec<_>>>()?;
        let factor = |groups: &[Group]| {
            let hits = slow.iter().filter(|(named, _)| groups.iter().any(|group| named.meets(group)));
            hits.map(|(_, factor)| *factor).reduce(f64::max).unwrap_or(1.0)
        };
        let groups = groups
            .map(<[Group]>::to_vec)
            .or_else(|| assign(instance, layout))
            .ok_or_else(|| Error::Layout { fault: "its groups do not fit into the nodes".into() })?;
        let mut places = Self { units: Vec::new(), pipelines: Vec::new() };
        let of_pipeline = |a: &Group, b: &Group| (a.template, a.pipeline) == (b.template, b.pipeline);
        for of_pipeline in groups.chunk_by(of_pipeline) {
            let (pipeline, template) = (places.pipelines.len(), of_pipeline[0].template);
            places.pipelines.push(PipelinePlace {
                template,
                first_unit: places.units.len(),
                num_micro_batches: layout.templates[template].num_micro_batches,
                first_micro_batch: 0,
            });
            places.units.extend(of_pipeline.chunk_by(|a, b| a.stage == b.stage).map(|groups| Unit {
                template,
                stage: groups[0].stage,
                pipeline,
                groups: groups.to_vec(),
                factor: factor(groups),
            }));
        }
        if !lost.is_empty() {
            places.drop_pipelines_on(layout, &lost, what_if)?;
            places.fit(instance, layout, what_if)?;
        }
        let mut next = 0;
        for pipeline in &mut places.pipelines {
            pipeline.first_micro_batch = next;
            next += pipeline.num_micro_batches;
        }
        Ok(places)
    }

    /// Drops the pipelines that a lost node has a part in; the rest take their samples, each next
    /// micro-batch to whoever has the fewest.
    fn drop_pipelines_on(
        &mut self,
        layout: &Layout,
        lost: &BTreeSet<(usize, u32)>,
        what_if: &WhatIf,
    ) -> Result<()> {
        let (units, pipelines) = (std::mem::take(&mut self.units), std::mem::take(&mut self.pipelines));
        let ends = pipelines.iter().skip(1).map(|p| p.first_unit).chain([units.len()]);
        let mut missing = 0u64;
        for (pipeline, end) in pipelines.iter().zip(ends) {
            let own = &units[pipeline.first_unit..end];
            let hit = own
                .iter()
                .flat_map(|unit| &unit.groups)
                .any(|group| lost.contains(&(group.pool, group.node)));
            let template = &layout.templates[pipeline.template];
            if hit {
                missing += template.num_samples();
                continue;
            }
            let at = self.pipelines.len();
            self.pipelines.push(PipelinePlace { first_unit: self.units.len(), ..*pipeline });
            self.units.extend(own.iter().map(|unit| Unit { pipeline: at, ..unit.clone() }));
        }
        if self.pipelines.is_empty() {
            return Err(bad(
                "--lose",
                &what_if.lose.join(","),
                "nodes without which a pipeline is left: every one has a part there, so the plan has to be made anew",
            ));
        }
        while missing > 0 {
            let relative = |pipeline: &PipelinePlace| {
                let planned = layout.templates[pipeline.template].num_micro_batches;
                // Of alike pipelines the first; of unlike ones whoever has grown the least.
                u64::from(pipeline.num_micro_batches) * 1_000_000 / u64::from(planned.max(1))
            };
            let Some(least) = (0..self.pipelines.len()).min_by_key(|at| relative(&self.pipelines[*at]))
            else {
                break;
            };
            let pipeline = &mut self.pipelines[least];
            pipeline.num_micro_batches += 1;
            missing = missing.saturating_sub(u64::from(layout.templates[pipeline.template].micro_batch));
        }
        Ok(())
    }

    /// That memory still holds what the pipelines that are left need.
    fn fit(&self, instance: &Instance, layout: &Layout, what_if: &WhatIf) -> Result<()> {
        // Alike ones are one template, with the first of them.
        let mut alike: BTreeMap<(usize, u32), (usize, u32)> = BTreeMap::new();
        for (at, pipeline) in self.pipelines.iter().enumerate() {
            alike.entry((pipeline.template, pipeline.num_micro_batches)).or_insert((at, 0)).1 += 1;
        }
        let template = |(&(template, num_micro_batches), &(_, count)): (&(usize, u32), &(usize, u32))| {
            Template { count, num_micro_batches, ..layout.templates[template].clone() }
        };
        let left = Layout { templates: alike.iter().map(template).collect(), ..*layout };
        let priced = price(instance, &left);
        let mut worst: Option<(f64, f64, &Group)> = None;
        for (template, (first, _)) in priced.templates.iter().zip(alike.values()) {
            let units = &self.units[self.pipelines[*first].first_unit..];
            for (stage, unit) in template.stages.iter().zip(units) {
                let (group, needed) = (&unit.groups[0], stage.memory_bytes);
                let missing = needed - instance.pools[group.pool].memory_bytes;
                if missing > worst.map_or(0.0, |(most, ..)| most) {
                    worst = Some((missing, needed, group));
                }
            }
        }
        let Some((missing, needed, group)) = worst else { return Ok(()) };
        let pool = &instance.pools[group.pool];
        Err(Error::LossDoesNotFit {
            lost: what_if.lose.join(", "),
            device: format!("{}-{}/{}", pool.kind, group.node, group.first_device),
            needed_bytes: needed.ceil() as u64,
            limit_bytes: pool.memory_bytes as u64,
            missing_bytes: missing.ceil() as u64,
        })
    }
}
