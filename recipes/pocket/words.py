"""The open word list for "say ...", "repeat after me ..." and free speech, and first names."""

from __future__ import annotations

_NOUNS = """
apple arm army art aunt baby back bag ball banana band bank basket bath beach bean bear bed bee bell belt bench
bicycle bird birthday blanket boat body bone book boot bottle bowl box boy branch bread breakfast brick bridge brother
brush bucket building bus bush butter button cabin cake camel camera camp candle car card carpet carrot castle cat
ceiling chain chair chalk cheese cherry chest chicken child church circle city class clock cloth cloud clown coat
coffee coin color comb cookie copper corn corner cotton country court cousin cow cream crowd crown cup curtain cushion
dance danger daughter dawn day desk diamond dinner dish doctor dog doll door dragon drawer dream dress drum duck dust
ear earth east edge egg elbow engine evening eye face fact family farm farmer father feather fence field finger fire
fish flag flame flood floor flower fly fog foot forest fork fox friend frog fruit game garden gate ghost giant gift
girl glass glove goat gold grandmother grape grass ground group guitar hair hall hammer hand harbor hat heart heat
helmet hill history hole holiday home honey hook horse hospital hotel hour house husband ice idea island jacket jar
jewel job journey juice jungle kettle key king kitchen kite knee knife knot ladder lady lake lamb lamp land language
leaf leather leg lemon lesson letter library light lightning lion lip list lock log lunch machine man map market mask
meal meat medicine melon metal middle milk mill minute mirror moment money monkey month moon morning mother mountain
mouse mouth movie mud muscle museum music nail name neck needle nest net night noise north nose note number nurse nut
ocean office oil onion orange oven owl page paint palace pan paper parade parent park party path peace peach pear pen
pencil people pepper person piano picnic picture pie pig pillow pilot pipe place planet plant plate pocket poem police
pond pony pool potato pot powder present price prince prize problem queen question rabbit radio rain rainbow rat ray
rice ring river road robot rock rocket roof room root rope rose ruler sail sailor salt sand sandwich school science
scissors sea season seat secret seed shade shadow shape sheep shelf shell ship shirt shoe shop shore shoulder sign
silk silver sister size skin sky sleep smile smoke snake snow soap sock sofa soil soldier song sound soup south space
spider spoon spring square stable stage stair stamp star station steam step stick stone store storm story stove
stranger street string student sugar suit summer sun supper surprise sweater table tail tailor tea teacher team tear
tent test theater thing thread throat thumb ticket tiger time toe tomato tongue tool tooth top towel tower town toy
track train tree trip trouble truck trumpet tunnel turtle umbrella uncle valley vase vegetable vest village violin
voice wagon wall watch water wave way weather week well west whale wheat wheel whistle wife wind window wing winter
wire wish wolf woman wood wool word work world worm wrist yard year zebra zoo actor address adult advice airport album
alley ambulance anchor angel animal ankle answer ant apartment april arrow artist attic author avenue award badge
bakery balance balcony balloon bamboo barn barrel battle beard beauty beetle biscuit blade blossom board bomb border
boss bottom bracelet brain brass bread breath breeze bride bubble bug bull bullet bunch butcher butterfly cabbage
cactus calendar calf canal candy cannon canyon captain cargo carpenter cattle cave cellar cement center century cereal
champion channel chapter charm chef chimney chin chocolate choice cigar cinema claw clay cliff climate closet clue
coach coast cobweb coconut collar college colony column comet comfort compass concert contest cook coral costume
cottage couch couple courage cover cradle crayon creature creek cricket crop cross cube culture current curve custom
customer dad deck deer dentist desert design dessert detail detective dictionary dime direction distance district
doorbell dozen drop eagle earring echo education effort election elephant elevator emperor energy enemy envelope event
example exit expert factory fairy faith fan fashion fear festival fever fiber figure film flashlight flavor fleet
flesh flour flute foam folder food force fortune fossil fountain frame freedom freezer fuel fun fur furniture future
garage garlic gas gear gem general giraffe glacier globe glory glue government grain grandfather gravity grocery guard
guest guide gun gym habit handle harvest hawk health helicopter hero hobby horn hunger hunter hurricane ink inch
insect instrument iron item ivory jam jeans jelly joke joy judge jug kangaroo keyboard kid kingdom kitten lab lace law
lawn lawyer lead leader lemonade level liberty lid life limb lime line liquid lizard lobster luck lumber lunchbox
magazine magic magnet mail mane manager marble march mat match math matter mayor meadow member memory message method
mind miner mineral mist mistake mixture model mom monster mood mosquito moss motor mouthful movement mug mushroom
mystery napkin nation nature neighbor nephew nerve news newspaper nickel niece nobody noon noodle novel oak object
officer olive opera orchard orchestra order oven owner ox oxygen pack package pajamas palm panda panther parcel parrot
partner passage passenger paste pasture patient pattern pavement paw pea peanut pearl pebble penny perfume pet photo
phrase pigeon pill pin pine pirate pizza plain plane plastic plum poet point poison polar pole popcorn port poster
pouch pound power prairie prayer prisoner profit program promise proof property pumpkin puppet puppy purple purpose
purse puzzle pyramid quarter quilt race radish raft railway raisin ranch reason receipt recipe record refrigerator
region relative report rest reward rhyme rhythm ribbon riddle river roller rooster row rug sack saddle safety salad
salmon sample satellite sauce saucer scale scarf scene scent scientist score scout screen screw sculpture seal seaweed
sentence servant service shark shed sheet sheriff shield shovel shower sidewalk signal silence singer sink skate
skeleton sketch skill skirt skull sled sleeve slipper slope snail snowman society soda speech speed spice spirit
sponge spot squirrel stain statue steak steel stem stomach stool stream strawberry stripe studio subject subway
success suitcase sunset supply surface swan sweat swing sword symbol system tale talent tank tape target task taste
tax taxi telephone telescope television temple term thief thorn thought throne thunder tide tie tin tissue title toast
tobacco tourist tractor trade tradition trail treasure treat triangle tribe trick truth tube tulip turkey twig twin
universe vacation value van vapor veil vein velvet victory view vine vinegar visitor volcano volume voyage waist
waiter walnut war wardrobe wax wealth weapon weed weight wheelbarrow willow wine wisdom witch witness wizard wound
yarn yogurt youth zipper zone
"""

_VERBS = """
add agree allow answer appear arrive ask bake beat become begin believe bend bite blow borrow bounce break breathe
bring build burn buy call carry catch cause change chase check choose clap clean climb close collect come compare cook
copy count cover crawl cross cry cut dance decide deliver describe dig discover divide draw dress drink drive drop dry
eat enjoy enter explain fall feed feel fight fill find finish fix float fly fold follow forget forgive freeze gather
get give glow go grab greet grow guess hang happen hate hear help hide hit hold hope hug hunt hurry imagine improve
invite jump keep kick kiss knock know laugh lean learn leave lend let lie lift like listen live look lose love make
march measure meet melt mix move need notice obey offer open order pack paint pass pay peel pick plan play point
polish pour practice prefer prepare press pretend protect pull push put reach read receive remember remove repair
repeat reply rescue return ride rise roll rub run save say scratch search see sell send serve set sew shake share
shine shoot shout show shut sing sit skip slide smell sneeze solve speak spell spend spill spin split spread stand
start stay steal stir stop stretch study swallow sweep swim take talk teach tell thank think throw tie touch travel
try turn twist type understand use visit wait wake walk want warn wash wear weigh whisper win wipe wonder worry wrap
write yell zoom
"""

_ADJECTIVES = """
able afraid alive alone amazing ancient angry awake awful bad beautiful best better big bitter black blue bold brave
bright broad broken brown busy calm careful careless cheap cheerful clean clear clever close cloudy cold comfortable
common cool correct crazy crooked cruel curious curly cute damp dangerous dark dead deaf dear deep delicious different
difficult dirty double dry dull eager early easy elegant empty equal even exact excellent excited expensive extra fair
false famous fancy far fast fat favorite fierce fine firm first flat foolish foreign free fresh friendly frozen full
funny gentle giant glad golden good grand gray great greedy green handsome happy hard healthy heavy helpful high
hollow honest hot huge hungry important impossible jolly kind large last late lazy left little local lonely long loose
loud lovely low lucky mad magic main merry mighty minor modern narrow natural near neat nervous new nice noisy normal
odd old open orange ordinary pale perfect pink plain pleasant polite poor popular pretty private proud public pure
purple quick quiet rare ready real red rich right ripe rough round royal rude rusty sad safe same secret serious
shallow sharp shiny short shy sick silent silly silver simple single sleepy slim slippery slow small smart smooth soft
solid sorry sour special spicy steep sticky stiff still strange strict strong stupid sudden sunny super sweet swift
tall tame tasty tender terrible thick thin thirsty tidy tight tiny tired tough true ugly unusual usual warm weak weary
wet white whole wide wild windy wise wonderful wooden wrong yellow young
"""

_OTHERS = """
above across after again against ago almost along already also always among another any around away because before
behind below beside between beyond both but down during each either enough even ever every everyone everything few for
from here how if inside instead into just later less many maybe more most much near never next none nothing now of off
often on once only or other our out outside over past perhaps quite rather really several she since so some someone
something sometimes soon such than that their them then there these they this those through today together tomorrow
tonight too toward twice under until up upon very we what when where which while who why with within without yes
yesterday yet you your
"""

# Short spoken numbers stand in the list so that they mix with other words.
_NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million first second third
fourth fifth
"""
NUMBER_WORDS = tuple(_NUMBERS.split())

_FIRST_NAMES = """
Alice Anna Ben Bob Carol Carlos Charlie Clara Daniel David Diana Edward Ella Emily Emma Eric Eva Frank George Grace
Hannah Harry Helen Henry Ivan Jack James Jane Jenny John Julia Karen Kate Kevin Laura Leo Linda Lisa Lucas Lucy Maria
Mark Martin Mary Max Michael Mia Nina Nora Oliver Oscar Paul Peter Rachel Robert Rosa Ruth Sam Sarah Simon Sophie
Steve Susan Thomas Tim Tom Victor Walter William Zoe
"""
FIRST_NAMES = tuple(_FIRST_NAMES.split())

NOUNS = tuple(dict.fromkeys(_NOUNS.split()))
VERBS = tuple(dict.fromkeys(_VERBS.split()))
ADJECTIVES = tuple(dict.fromkeys(_ADJECTIVES.split()))
OTHERS = tuple(dict.fromkeys(_OTHERS.split()))
OPEN_WORDS = tuple(dict.fromkeys(NOUNS + VERBS + ADJECTIVES + OTHERS + NUMBER_WORDS))
