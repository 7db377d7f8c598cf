//! The reference passes; every fault fails the check that is there for it.

use std::time::{Duration, Instant};

use hgct_core::check::{CheckReport, Verdict};
use hgct_core::ids::{DeviceId, Kind};

use super::checks::{SpeedShape, speed};
use super::{names, run_named};
use crate::engine::Engine;
use crate::reference::{Fault, FaultyEngine, ReferenceEngine};

const BUDGET: Duration = Duration::from_mins(5);

/// Runs the named checks.
fn check(engine: &mut dyn Engine, names: &[&str], budget: Duration) -> CheckReport {
    let device = DeviceId::new("local/reference:0").unwrap();
    let report = run_named(engine, device, Kind::new("cpu/reference").unwrap(), budget, names);
    assert_eq!(report.checks.len(), names.len(), "{names:?} must be names of checks");
    report
}

/// Names of the checks that failed.
fn failed(report: &CheckReport) -> Vec<&str> {
    report.checks.iter().filter(|row| row.verdict == Verdict::Fail).map(|row| row.name.as_str()).collect()
}

#[test]
fn the_reference_passes_every_check() {
    // Memory is measured of the whole process, so it has a test binary of its own; the speed
    // check's own shape is for real engines.
    let names: Vec<&str> = names().into_iter().filter(|name| !["memory", "speed"].contains(name)).collect();
    let report = check(&mut ReferenceEngine::new(), &names, BUDGET);
    assert!(report.checks.iter().all(|row| row.verdict == Verdict::Pass), "{report}");
    assert_eq!(report.verdict, Verdict::Pass);
    let small = SpeedShape { hidden_size: 16, intermediate_size: 16, num_heads: 2, seq_len: 8 };
    let finding = speed(&mut ReferenceEngine::new(), Instant::now() + BUDGET, &small).unwrap();
    assert!(finding.message.starts_with("width 16: forward "), "{finding:?}");
}

#[test]
fn every_fault_fails_its_check_and_no_unrelated_one() {
    for (fault, fails, passes) in [
        (
            Fault::HalfFirstLayerGradient,
            &["embedding", "block", "stage-of-all-layers"][..],
            &["export-import"][..],
        ),
        (Fault::Nondeterministic, &["determinism"], &["block"]),
        (Fault::LifoOnly, &["three-in-flight"], &["block", "stage-of-all-layers"]),
        (Fault::WrongOperator, &["embedding", "block", "rope-linear"], &["head"]),
        (Fault::Panic, &["head"], &["export-import"]),
        (Fault::RoundedExport, &["export-import"], &["block"]),
        (Fault::KeepsDropped, &["drop"], &["three-in-flight"]),
        (Fault::WrongRecompute, &["recompute"], &["three-in-flight"]),
        (Fault::KeepsGradients, &["determinism"], &["three-in-flight"]),
        (Fault::LoadsOnce, &["load-again"], &["block"]),
        (Fault::ReportsTwice, &["block", "tied-both-ends"], &["evaluate-and-logits"]),
        (Fault::ShiftedLogits, &["evaluate-and-logits"], &["stage-of-all-layers"]),
    ] {
        // Each check alone: a fault like `LoadsOnce` shows in whatever comes second.
        for (name, expected) in
            fails.iter().map(|f| (f, Verdict::Fail)).chain(passes.iter().map(|p| (p, Verdict::Pass)))
        {
            let report = check(&mut FaultyEngine::new(ReferenceEngine::new(), fault), &[*name], BUDGET);
            assert_eq!(report.verdict, expected, "{fault:?}: {report}");
        }
    }
}

#[test]
fn a_panic_is_a_row_with_its_message_and_the_others_still_run() {
    let mut engine = FaultyEngine::new(ReferenceEngine::new(), Fault::Panic);
    let report = check(&mut engine, &["block", "head", "export-import"], BUDGET);
    assert_eq!(failed(&report), ["block", "head"]);
    assert_eq!(report.checks[0].message, "panicked: the fault that was asked for");
}

#[test]
fn an_engine_that_hangs_ends_with_the_budget() {
    let mut engine = FaultyEngine::new(ReferenceEngine::new(), Fault::Hang);
    let start = Instant::now();
    let report = check(&mut engine, &["block", "head", "three-in-flight"], Duration::from_millis(400));
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(failed(&report).len(), 3);
    assert!(report.checks[0].message.contains("no answer before the deadline"), "{report}");
    let late = check(&mut ReferenceEngine::new(), &["block"], Duration::ZERO);
    assert!(late.checks[0].message.contains("not reached within"), "{late}");
}

#[test]
fn a_report_keeps_its_figures_as_json() {
    let report = check(&mut ReferenceEngine::new(), &["block"], BUDGET);
    let text = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<CheckReport>(&text).unwrap(), report);
    let row = &report.checks[0];
    assert_eq!((row.error, row.tolerance), (Some(0.0), Some(1e-5)));
}
