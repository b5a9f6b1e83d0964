//! Many requests at once on one thread.

use anyhow::Result;
use bench_work::offsets::Offsets;
use bench_work::protocol::{Kind, Opening, Work};

use super::Bench;
use crate::contender::Contender::{self, ImagoAsync, Library, Qcow2RsUring, Qemu, Raw};
use crate::contender::Field;
use crate::counts;
use crate::figures::{Line, Spread, ratios};
use crate::place::{MIB, Place, Resident, STRETCH, Shape, WITHIN, drop_from_cache, opening};

const CONTENDERS: [Contender; 5] = [Raw, Library, Qcow2RsUring, ImagoAsync, Qemu];
const DEPTH: usize = 32;

/// Beside a loop on io_uring with the file registered. On a disk: tmpfs hands every request to a thread of the kernel.
pub fn queue(bench: &mut Bench) -> Result<Vec<Line>> {
    let (scale, place) = (bench.scale, &bench.disk);
    let shape = Shape::mapped(scale.size(scale.pick(256, 1024) * MIB), 64 << 10, Resident::All);
    shape.make(place, "queue", &CONTENDERS)?;
    let mut lines = Vec::new();
    for direct in [false, true] {
        let opening = |who| Opening { direct, ..opening(&place.of(who, "queue")) };
        let cache = if direct { "O_DIRECT" } else { "buffered" };
        if direct {
            // Lest requests find pieces of it there, which would have to be written or dropped first.
            CONTENDERS.into_iter().try_for_each(|who| drop_from_cache(&place.of(who, "queue")))?;
        }
        for (kind, verb) in [(Kind::Read, "read"), (Kind::Write, "overwrite")] {
            let count = if direct { scale.pick(320, 640) } else { scale.pick(2_048, 4_096) };
            let work = |seed| {
                let offsets = Offsets::Random { units: shape.stretches(), unit: STRETCH, within: WITHIN, seed };
                Work::new(kind, 4096, offsets, count).warm(64).depth(DEPTH)
            };
            let rounds = if direct { scale.rounds().min(20) } else { scale.rounds() };
            let title = format!("random 4 KiB {verb}, queue of {DEPTH}, {cache}, {}", place.name);
            let measured = Field::open(&CONTENDERS, |who| Ok(opening(who))).and_then(|mut field| {
                let samples = field.rounds(rounds, false, work)?;
                field.close()?;
                Ok(samples)
            });
            match measured {
                Ok(samples) => lines.push(ratios("queue", &title, &samples).at_most(1.10)),
                Err(error) => {
                    eprintln!("  {title}: {error:#}");
                    continue;
                }
            }
            lines.extend(counted(
                &bench.tmpfs,
                &title,
                &opening,
                &Work { count: scale.pick(3_200, 32_000), ..work(0) },
            )?);
        }
    }
    Ok(lines)
}

fn counted(traces: &Place, title: &str, opening: &dyn Fn(Contender) -> Opening, work: &Work) -> Result<Vec<Line>> {
    let mut enters = Line::new("queue", format!("{title}: io_uring_enter"), "per operation").at_most(0.1);
    let mut others = Line::new("queue", format!("{title}: other system calls"), "per operation").at_most(0.01);
    for who in [Raw, Library, Qcow2RsUring].into_iter().filter(|who| who.built()) {
        let calls = counts::calls(who, &opening(who), work, &traces.path("trace"))?;
        let entered = calls.by_name.get("io_uring_enter").copied().unwrap_or(0);
        let each = |count: u64| Some(Spread::exact(count as f64 / work.count as f64));
        enters = enters.value(who, each(entered));
        others = others.value(who, each(calls.total() - entered));
    }
    Ok(vec![enters, others])
}
