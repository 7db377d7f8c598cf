//! What is wrong with a plan, whoever wrote it. Shares the cost model with the search, nothing else.

use std::collections::BTreeMap;
use std::fmt;

use hgct_core::canonical::Hash;
use hgct_core::cluster::{ClusterSpec, Isolation};
use hgct_core::plan::Plan;
use hgct_core::profile::Profile;
use hgct_core::schedule::Schedule;
use serde::{Deserialize, Serialize};

use crate::cost::{DeviceCost, MemoryLimit, ModelShape, StageLoad};
use crate::simulate::simulate;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// The run will go, but not as it could, or not as predicted.
    Warning,
    /// The run must not start.
    Error,
}

/// One thing that a linter says.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Which rule: an invariant (`P-1` to `P-6`) or a short name.
    pub rule: String,
    /// What was found, and where.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        write!(f, "{severity} {}: {}", self.rule, self.message)
    }
}

/// All findings, worst first.
pub fn lint(plan: &Plan, cluster: &ClusterSpec, profile: &Profile) -> Vec<Finding> {
    let mut lint = Lint { plan, cluster, profile, findings: Vec::new() };
    // Everything else relies on a plan whose invariants hold.
    if let Err(error) = plan.validate() {
        let rule = match &error {
            hgct_core::Error::Plan { invariant, .. } => invariant,
            _ => "plan",
        };
        lint.say(Severity::Error, rule, error.to_string());
        return lint.findings;
    }
    lint.documents();
    if lint.devices() {
        lint.memory();
        lint.prediction();
        lint.balance();
    }
    lint.findings.sort_by(|a, b| b.severity.cmp(&a.severity).then_with(|| a.cmp(b)));
    lint.findings
}

struct Lint<'a> {
    plan: &'a Plan,
    cluster: &'a ClusterSpec,
    profile: &'a Profile,
    findings: Vec<Finding>,
}

impl Lint<'_> {
    fn say(&mut self, severity: Severity, rule: &str, message: String) {
        self.findings.push(Finding { severity, rule: rule.into(), message });
    }

    /// The documents that the plan was made from must be these.
    fn documents(&mut self) {
        let documents = [
            ("cluster", &self.plan.cluster, Hash::of(self.cluster)),
            ("profile", &self.plan.profile, Hash::of(self.profile)),
        ];
        for (name, known, now) in documents {
            match known {
                None => self.say(Severity::Note, name, format!("the plan does not name its {name}")),
                Some(known) if *known != now => {
                    let message =
                        format!("the plan was made from {} but this is {}", known.short(), now.short());
                    self.say(Severity::Warning, name, message);
                }
                Some(_) => {}
            }
        }
        if self.profile.seq_len != self.plan.seq_len {
            let message =
                format!("measured with {} tokens, planned with {}", self.profile.seq_len, self.plan.seq_len);
            self.say(Severity::Error, "profile", message);
        }
        if self.profile.model != Hash::of(&self.plan.model) {
            self.say(Severity::Error, "profile", "measured with another model".into());
        }
        if self.plan.isolation != self.profile.isolation {
            let message = format!("planned {:?}, measured {:?}", self.plan.isolation, self.profile.isolation);
            self.say(Severity::Warning, "isolation", message);
        }
        if self.plan.isolation == Isolation::Unisolated {
            let message = "kinds share the cores unrestrained; expect more spread".into();
            self.say(Severity::Note, "isolation", message);
        }
    }

    /// Every rank's device must be there, measured, and under the grant it was measured with.
    /// Whether times and memory can be computed.
    fn devices(&mut self) -> bool {
        let mut usable = true;
        for (rank, of_plan) in self.plan.ranks.iter().enumerate() {
            let name = &of_plan.device;
            let mut errors = Vec::new();
            match self.cluster.device(name) {
                None => errors.push(("device", format!("{name} is not in the cluster"))),
                Some((node, device)) => {
                    if node.name != of_plan.node || device.kind != of_plan.kind {
                        errors.push((
                            "device",
                            format!("{name} is {} on {} in the cluster", device.kind, node.name),
                        ));
                    }
                    if device.grant != of_plan.grant {
                        errors.push(("grant", format!("{name} has another grant in the cluster")));
                    }
                }
            }
            let mut missing = Vec::new();
            match self.profile.device(name) {
                None => missing.push(("profile", format!("{name} was not measured"))),
                Some(row) => {
                    if row.grant != of_plan.grant {
                        errors.push(("grant", format!("{name} was measured under another grant")));
                    }
                    let cost = DeviceCost::new(row);
                    for pipeline in &self.plan.pipelines {
                        let here =
                            pipeline.stages.iter().any(|id| self.plan.stage(*id).rank().index() == rank);
                        if here && cost.size(pipeline.micro_batch).is_none() {
                            let size = pipeline.micro_batch;
                            missing.push((
                                "profile",
                                format!("{name} was not measured with micro-batches of {size}"),
                            ));
                        }
                    }
                }
            }
            usable &= missing.is_empty() && self.cluster.device(name).is_some();
            for (rule, message) in errors.into_iter().chain(missing) {
                self.say(Severity::Error, rule, message);
            }
        }
        for a in &self.plan.ranks {
            for b in &self.plan.ranks {
                if a.device != b.device && self.profile.link(&a.device, &b.device).is_none() {
                    usable = false;
                    let message = format!("the link from {} to {} was not measured", a.device, b.device);
                    self.say(Severity::Error, "profile", message);
                }
            }
        }
        usable
    }

    /// P-4: no device, and no shared host memory, above its limit.
    fn memory(&mut self) {
        let plan = self.plan;
        let shape = ModelShape::new(&plan.model, plan.seq_len);
        let in_flight = Schedule::of(plan).and_then(|schedule| schedule.dry_run(plan)).unwrap_or_default();
        let mut owned = vec![(0, 1); plan.ranks.len()];
        for group in &plan.owners {
            let (elements, holders) = &mut owned[group.owner.index()];
            *elements += group.num_elements();
            *holders = (*holders).max(group.holders.len() as u64);
        }
        let mut hosts = BTreeMap::new();
        for (rank, of_plan) in plan.ranks.iter().enumerate() {
            let Some((node, device)) = self.cluster.device(&of_plan.device) else { continue };
            let Some(row) = self.profile.device(&of_plan.device) else { continue };
            let cost = DeviceCost::new(row);
            let (mut host, mut own) = (0u64, 0u64);
            for (pipeline, id) in plan.pipelines.iter().flat_map(|p| p.stages.iter().map(move |id| (p, id))) {
                let stage = plan.stage(*id);
                if stage.rank().index() != rank {
                    continue;
                }
                // What the rank owns, and the framework, count with its first stage.
                let first = host == 0;
                let load = StageLoad {
                    layers: &stage.layers(),
                    micro_batch: pipeline.micro_batch,
                    in_flight: in_flight.get(id.index()).copied().unwrap_or(1),
                    recompute: stage.recompute,
                    owned: if first { owned[rank].0 } else { 0 },
                    // A tied embedding's second holder has one more buffer: small, and left out as in
                    // the search.
                    num_holders: plan.pipelines.len() as u64,
                };
                if let Some(memory) = cost.memory(&shape, load, device.memory_bytes > 0) {
                    host += memory.host_bytes - if first { 0 } else { cost.base_memory_bytes };
                    own += memory.device_bytes;
                }
            }
            *hosts.entry(&node.name).or_insert(0u64) += host;
            let limit = MemoryLimit::of(device);
            for (what, needed, limit) in
                [("host memory", host, limit.host_bytes), ("memory of its own", own, limit.device_bytes)]
            {
                if needed > limit {
                    let message = format!(
                        "{} needs {needed} bytes of {what} and has {limit}: {} are missing",
                        of_plan.device,
                        needed - limit
                    );
                    self.say(Severity::Error, "P-4", message);
                } else if needed > limit / 20 * 19 {
                    let message =
                        format!("{} fills more than 95 % of its {limit} bytes of {what}", of_plan.device);
                    self.say(Severity::Warning, "P-4", message);
                }
            }
        }
        for (node, needed) in hosts {
            let limit = self.cluster.nodes.iter().find(|n| n.name == *node).map_or(0, |n| n.memory_bytes);
            if needed > limit {
                let message = format!("devices on {node} need {needed} bytes of host memory of {limit}");
                self.say(Severity::Error, "P-4", message);
            }
        }
    }

    /// P-6: a prediction, its bound and what limits it stand beside the plan, and are these.
    fn prediction(&mut self) {
        let Some(prediction) = &self.plan.prediction else {
            return self.say(Severity::Warning, "P-6", "the plan has no prediction".into());
        };
        if prediction.bound_ns > prediction.step_ns || prediction.limited_by.is_empty() {
            let message =
                format!("a step of {} ns beats its bound of {} ns", prediction.step_ns, prediction.bound_ns);
            self.say(Severity::Error, "P-6", message);
        }
        match simulate(self.plan, self.profile) {
            Err(error) => self.say(Severity::Error, "P-6", error.to_string()),
            Ok(now) if now.step_ns != prediction.step_ns => {
                let message = format!(
                    "predicted {} ns a step, but this profile gives {}",
                    prediction.step_ns, now.step_ns
                );
                self.say(Severity::Warning, "P-6", message);
            }
            Ok(_) => {}
        }
    }

    /// A device or a stage that slows the others.
    fn balance(&mut self) {
        let plan = self.plan;
        let shape = ModelShape::new(&plan.model, plan.seq_len);
        let costs: Vec<DeviceCost> =
            plan.ranks.iter().filter_map(|r| self.profile.device(&r.device)).map(DeviceCost::new).collect();
        let Ok(simulation) = simulate(plan, self.profile) else { return };
        let counts = shape.counts(&(0..shape.num_layers));
        let speed = |cost: &DeviceCost| {
            let size = |s: &crate::cost::SizeCost| {
                f64::from(s.micro_batch) / (s.forward(counts) + s.backward(counts)).max(1) as f64
            };
            cost.sizes.iter().map(size).fold(0.0, f64::max)
        };
        for (rank, of_plan) in plan.ranks.iter().enumerate() {
            let others: f64 =
                costs.iter().enumerate().filter(|(r, _)| *r != rank).map(|(_, c)| speed(c)).sum();
            // What the others reach side by side if they lose a tenth of it.
            let without = f64::from(plan.global_batch) / (0.9 * others);
            if others > 0.0 && without < simulation.step_ns as f64 {
                let message = format!(
                    "{} slows the run: without it a step may take {:.0} ns instead of {}",
                    of_plan.device, without, simulation.step_ns
                );
                self.say(Severity::Warning, "slow", message);
            }
        }
        for (index, pipeline) in plan.pipelines.iter().enumerate() {
            let slope = |id: &hgct_core::plan::StageId| {
                let stage = plan.stage(*id);
                let counts = shape.counts(&stage.layers());
                costs[stage.rank().index()]
                    .size(pipeline.micro_batch)
                    .map_or(0, |s| s.forward(counts) + s.backward(counts))
            };
            let slopes: Vec<u64> = pipeline.stages.iter().map(slope).collect();
            let (most, sum): (u64, u64) = (slopes.iter().copied().max().unwrap_or(0), slopes.iter().sum());
            if most * slopes.len() as u64 > sum / 2 * 3 {
                let at = slopes.iter().position(|s| *s == most).unwrap_or(0);
                let device = &plan.ranks[plan.stage(pipeline.stages[at]).rank().index()].device;
                let message =
                    format!("{device} needs half as long again as the mean stage of pipeline {index}");
                self.say(Severity::Note, "balance", message);
            }
        }
    }
}
