"""Half an hour on a laptop that gets hot, is unplugged and runs low: fixed plans, and plans that are switched.

python examples/switching.py

Nothing is run, and time is virtual: the model is a shape, the laptop a profile, its heat and battery are made up.
"""

from edgert import Plan
from edgert.catalogue import find as find_models
from edgert.cost import Costs, Workload
from edgert.device import DeviceConfig
from edgert.profile import find as find_profile
from edgert.shapes import StaticShapes
from edgert.simulator import Background, Battery, Environment, Simulation, Thermal, candidates, poisson, simulate
from edgert.switching import Switcher

MINUTE = 60e6
(model,) = find_models(["Qwen3 4B"])
graph = model.shape("int4").graph
costs = Costs(graph, find_profile("lunarlake"), StaticShapes())
plans = {name: Plan.single(graph, DeviceConfig.parse(name)) for name in ("GPU", "NPU")}

typical = Workload(prompt_tokens=512, new_tokens=64)
loads = [typical, Workload(prompt_tokens=128, new_tokens=128), Workload(prompt_tokens=2048, new_tokens=32)]
requests = poisson(seed=1, count=180, mean_gap_us=10e6, loads=loads)
environment = Environment(
    # A game takes most of the GPU for a while.
    background=(Background("GPU", 6 * MINUTE, 12 * MINUTE, share=0.7, active_w=10.0),),
    thermals=(Thermal(None, resistance_c_per_w=3.0, time_constant_s=20.0, limit_c=80.0, resume_c=65.0, factor=1.8),),
    # 50 Wh, nearly a quarter full, unplugged after a quarter of an hour.
    battery=Battery(capacity_j=180e3, start_share=0.235, plugged_us=((0.0, 15 * MINUTE),)),
)


def show(name: str, found: Simulation) -> None:
    waits = sorted(served.ttft_us / 1e6 for served in found.served)
    hot = sum(event.what.endswith("throttled") for event in found.events)
    print(
        f"{name:9} {len(found.served)} served, median time to first token {waits[len(waits) // 2]:.2f} s, "
        f"worst {waits[-1]:.1f} s, {found.tokens_per_joule:.2f} tokens/J, throttled {hot} times, "
        f"battery {found.battery_share:.1%} at the end"
    )


for name, plan in plans.items():
    show(name, simulate(costs, {name: plan}, requests, environment))
switcher = Switcher(candidates(costs, plans, typical), dwell_us=30e6, forget_us=120e6)
switched = simulate(costs, plans, requests, environment, switcher)
show("switched", switched)
for switch in switched.switches:
    print(f"  at {switch.at_us / MINUTE:4.1f} min {switch.target}: {switch.reason}")
