//! The conformance suite of all engines, on every adapter of this host.

use std::time::Duration;

use hgct_core::check::Verdict;
use hgct_core::ids::{DeviceId, Kind};
use hgct_worker::conformance;
use hgct_worker_burn::{BurnEngine, adapter};

#[test]
fn every_adapter_passes_what_other_engines_pass() {
    let adapters = adapter::list();
    assert!(!adapters.is_empty(), "there is no Vulkan driver: run `make vulkan`");
    for adapter in adapters {
        let mut engine = BurnEngine::open(&adapter.device_string).unwrap();
        let device = DeviceId::new("here/burn:0").unwrap();
        let report =
            conformance::run(&mut engine, device, Kind::new("vulkan/burn").unwrap(), Duration::from_mins(5));
        for row in &report.checks {
            println!(
                "{:24} {:?} {:?} {:.1} s {}",
                row.name, row.verdict, row.error, row.seconds, row.message
            );
        }
        assert_eq!(report.verdict, Verdict::Pass, "{}: {:#?}", adapter.name, report.checks);
        assert!(report.checks.iter().all(|row| row.verdict == Verdict::Pass));
    }
}
