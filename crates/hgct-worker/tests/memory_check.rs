//! The memory check looks at the whole process, so nothing else may run beside it.

use std::time::Duration;

use hgct_core::check::Verdict;
use hgct_core::ids::{DeviceId, Kind};
use hgct_worker::conformance;
use hgct_worker::engine::Engine;
use hgct_worker::reference::{Fault, FaultyEngine, ReferenceEngine};

#[test]
fn growth_is_told_from_a_steady_process() {
    let verdict = |engine: &mut dyn Engine| {
        let device = DeviceId::new("local/reference:0").unwrap();
        let kind = Kind::new("cpu/reference").unwrap();
        let report = conformance::run_named(engine, device, kind, Duration::from_mins(5), &["memory"]);
        println!("{report}");
        report.verdict
    };
    assert_eq!(verdict(&mut ReferenceEngine::new()), Verdict::Pass);
    assert_eq!(verdict(&mut FaultyEngine::new(ReferenceEngine::new(), Fault::GrowingMemory)), Verdict::Fail);
}
