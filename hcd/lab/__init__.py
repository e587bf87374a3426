"""The path experiment: a tiny virtual machine rings hcd over every path that this host has, and the cost of each.

``hcd lab`` is three processes: the experiment itself (:mod:`hcd.lab.experiment`), the hcd that it measures, and the VMM
with the tiny guest (:mod:`hcd.lab.vmm`), which may be killed when a guest does not come back.
"""
