"""A bundle, or a plan, as one self-contained HTML page.

``facts`` and ``timeline`` turn manifests, plans and traces into plain data; ``charts`` turns that into Vega-Lite, and
``page`` puts both into the template. What draws, reads no manifest.
"""
